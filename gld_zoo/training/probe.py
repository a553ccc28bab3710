"""What `python -m gld_zoo.training.probe` starts: `gld-zoo probe`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("probe")

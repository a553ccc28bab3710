"""What `python -m gld_zoo.training.export` starts: `gld-zoo export`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("export")

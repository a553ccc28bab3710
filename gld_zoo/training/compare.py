"""What `python -m gld_zoo.training.compare` starts: `gld-zoo compare`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("compare")

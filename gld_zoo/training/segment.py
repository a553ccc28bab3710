"""What `python -m gld_zoo.training.segment` starts: `gld-zoo segment`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("segment")

"""What `python -m gld_zoo.training.distill` starts: `gld-zoo distill`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("distill")

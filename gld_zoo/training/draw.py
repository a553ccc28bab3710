"""What `python -m gld_zoo.training.draw` starts: `gld-zoo draw`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("draw")

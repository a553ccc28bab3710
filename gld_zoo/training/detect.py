"""What `python -m gld_zoo.training.detect` starts: `gld-zoo detect`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("detect")

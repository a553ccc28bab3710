"""A door for a clone: `gld-zoo detect`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("detect")

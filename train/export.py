"""A door for a clone: `gld-zoo export`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("export")

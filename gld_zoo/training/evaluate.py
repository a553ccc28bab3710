"""What `python -m gld_zoo.training.evaluate` starts: `gld-zoo evaluate`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("evaluate")

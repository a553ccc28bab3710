"""What `python -m gld_zoo.training.store` starts: `gld-zoo store`."""

from gld_zoo.cli import start

if __name__ == "__main__":
    start("store")

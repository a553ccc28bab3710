"""A door for a clone: `gld-zoo compare`."""

import sys

from gld_zoo.cli import start

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, some of whose names are other packages'
    start("compare")

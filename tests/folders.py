"""Image folders as tests lay them out: an image of a class is of the class's colour."""

import numpy as np
from PIL import Image as PILImage

COLORS = dict(ant=(250, 0, 0), bee=(0, 250, 0), cat=(0, 0, 250), dog=(250, 250, 0))
COLORS |= dict(bus=(0, 250, 250), car=(250, 0, 250), train=(120, 60, 200), test=(30, 120, 60))
THREE = ("ant", "bee", "cat")


def picture(name, number=0):
    """Return an image of a class's colour; numbers differ in their first pixel."""
    pixels = np.full((8, 8, 3), COLORS[name], np.uint8)
    pixels[0, 0] = number % 256
    return PILImage.fromarray(pixels)


def put(folder, name, count=2, ending=".png", first=0):
    """Write images of a class into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(name, number).save(folder / f"{number}{ending}")


def tidy(folder, names=THREE, train=4, test=2):
    for name in names:
        put(folder / "train" / name, name, train)
        put(folder / "test" / name, name, test, first=100)
    return folder

"""Pictures of any kind as models take them, and where people say they are."""

from __future__ import annotations

import functools
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SYSTEM_FOLDERS = {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin"}
SYSTEM_FOLDERS |= {"system volume information", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "icon\r"}
# Pillow knows them by name, and opens them by other programs or not at all
NOT_PHOTOGRAPHS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def image_extensions() -> frozenset[str]:
    """Return the endings of files that Pillow opens as images, small letters."""
    endings = Image.registered_extensions()
    readable = set(Image.OPEN) - NOT_PHOTOGRAPHS
    return frozenset(ending for ending, kind in endings.items() if kind in readable)


def is_system_folder(name: str) -> bool:
    """Tell whether a folder of that name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Tell whether a file of that name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright and as RGB, with white under its transparent parts.

    16-bit grey is scaled to 8 bits; 32-bit integers count as 16-bit if one is above 255.

    Raises:
        ValueError: If it holds floats, whose white nothing tells.
    """
    if image.mode == "F":
        raise ValueError("it holds floats; convert it to 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert would cut every value above 255 to white
        values = np.asarray(image).clip(0, 65535)
        if image.mode != "I" or values.max() > 255:
            values = values // 257
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_images(patterns: Sequence[str]) -> Iterator[Path]:
    """Yield files: those named, the images in folders, those that patterns match.

    What is hidden or a system's own is passed over in folders, as the trainer does.
    """
    for pattern in patterns:
        literal = os.path.lexists(pattern)
        for path in map(Path, [pattern] if literal else _matches(pattern)):
            if os.path.isdir(path):  # false for a name that is too long, where pathlib raises
                yield from _images_below(path)
            else:
                yield path


def _images_below(folder: Path) -> Iterator[Path]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        within = file.relative_to(folder).parts[:-1]
        is_image = file.suffix.lower() in image_extensions() and not is_system_file(file.name)
        if is_image and not any(map(is_system_folder, within)):
            yield file


def _matches(pattern: str) -> list[str]:
    """Return what a pattern matches, or itself if nothing, to be named as not there."""
    return sorted(glob.glob(pattern, recursive=True)) or [pattern]


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB; a damaged one may raise anything, by its format."""
    with Image.open(path) as image:
        return to_rgb(image)


def read_images(patterns: Sequence[str], failed: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images that can be read; name the others on standard error and collect them."""
    for path in find_images(patterns):
        try:
            yield path, read_image(path)
        except Exception as error:
            print(f"{path}: skipped, {error}", file=sys.stderr)
            failed.append(path)

"""Recipes that come with the package: a YAML file of options each, found by its name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all recipes, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Return the file of a recipe that comes with the package.

    Raises:
        ValueError: If there is none of that name; it tells the nearest ones.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        told = f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no recipe {name!r}; {told}")
    return FOLDER / f"{name}.yaml"


def find(name: str) -> str:
    """Return the file that a recipe's name, or a path, means.

    A name goes before a file of that name in the current folder, which `./NAME` means.

    Raises:
        ValueError: If it is neither; it tells the nearest names.
    """
    if name in names():
        return str(path_of(name))
    if not name:
        raise ValueError("the name of the recipe is empty; give one, or a YAML file of options")
    path = Path(name)
    if os.path.lexists(path):
        return name
    if path.suffix == ".yaml" and path.stem in names():
        raise ValueError(
            f"there is no file {name}, and the recipe of that name is part of the package: name "
            f"it by --config {path.stem}"
        )
    if path.parent == Path() and path.suffix == "":
        path_of(name)
    return name


def command_of(name: str) -> str:
    """Return which command of `gld-zoo` a recipe of the package is for."""
    kinds = dict(detect_="detect", segment_="segment", linear_="probe")
    return next((kinds[kind] for kind in kinds if name.startswith(kind)), "distill")

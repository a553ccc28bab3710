"""Whether a model's classes are a dataset's, in number, name and order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gld_zoo.training.common.errors import ModelError

NEED_NOT_KNOW = (
    "fit a classifier to its features (teacher_head: fit), let their relations alone teach "
    "(teacher_head: none), or use one trained on this dataset"
)


def check_class_names(model: Any, label_names: Sequence[str], title: str) -> None:
    """Refuse a model of other classes than a dataset's, or of the same ones in another order.

    Args:
        model: One of timm's.
        label_names: The dataset's classes in order.
        title: What the error calls the model.

    Raises:
        ModelError: If their numbers differ, or a class that both name is at another place.
    """
    names = names_of(model, label_names)
    _check_count(model, label_names, title, "use one trained on this dataset")
    if names and names != list(label_names) and sorted(names) == sorted(label_names):
        place = next(i for i, name in enumerate(names) if name != label_names[i])
        raise ModelError(
            f"{title} has the dataset's classes in another order: class {place} is "
            f"{names[place]!r} to it and {label_names[place]!r} to the dataset; give the dataset "
            "its order, or train it on this one"
        )
    if names and (moved := _first_moved(names, label_names)):
        here, there = moved
        raise ModelError(
            f"{title} has some of the dataset's classes at other places: class {here} is "
            f"{names[here]!r} to it, and class {there} {label_names[there]!r} to the dataset; give "
            "the dataset its classes and their order, or train it on this one"
        )


def match_classes(
    model: Any, label_names: Sequence[str], title: str, *, remedy: str = NEED_NOT_KNOW
) -> list[int] | None:
    """Return at which of a teacher's places each of a dataset's classes stands; None if at its own.

    They are matched by name, where both have names.

    Args:
        model: One of timm's.
        label_names: The dataset's classes in order.
        title: What the error calls the model.
        remedy: What it advises where their numbers differ.

    Raises:
        ModelError: If they do, or some of the classes alone are known by name to both, and stand at
            other places.
    """
    _check_count(model, label_names, title, remedy)
    theirs = [_plain(name) for name in names_of(model, label_names) or ()]
    ours = [_plain(name) for name in label_names]
    if len(set(ours)) == len(ours) and sorted(theirs) == sorted(ours):
        places = [theirs.index(name) for name in ours]
        return None if places == list(range(len(ours))) else places
    check_class_names(model, label_names, title)
    return None


def _check_count(model: Any, label_names: Sequence[str], title: str, remedy: str) -> None:
    if model.num_classes != len(label_names):
        raise ModelError(
            f"{title} has {model.num_classes} classes and the dataset {len(label_names)}; {remedy} "
            "(teacher: null trains one, and its run folder is one)"
        )


def _first_moved(names: Sequence[str], label_names: Sequence[str]) -> tuple[int, int] | None:
    """Return the places of a class that a model and a dataset both know, if they differ.

    Spelling does not make another class; numbers are no names. A name can stand for several
    classes, as ImageNet's 'crane' does.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(label_names):
        places.setdefault(_plain(name), []).append(place)
    for place, name in enumerate(names):
        theirs = places.get(_plain(name), [place])
        if place not in theirs and not name.isdigit():
            return place, theirs[0]
    return None


def _plain(name: str) -> str:
    return "".join(name.casefold().replace("_", "").replace("-", "").split())


def names_of(model: Any, label_names: Sequence[str]) -> list[str] | None:
    """Return a model's class names; None if it has none, or if only the dataset's are numbers."""
    names = list(model.pretrained_cfg.get("label_names") or [])
    unnamed = _are_numbers(label_names) and not _are_numbers(names)
    return None if not names or unnamed else names


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdigit() for name in names)

"""Which columns of a dataset hold the images and what they are labelled, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Image, Value

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.rows import Table

# columns by convention, the first that is there
IMAGE_NAMES = (
    "image",
    "img",
    "file_name",
    "path",
)
LABEL_NAMES = ("label", "labels", "fine_label")
SHOWN = 10  # names in a message


class NoColumnError(DataError):
    """A dataset has no column of a type; the message names those it has."""


def pick_image_column(name: str, features: dict[str, Any], wanted: str | None) -> tuple[str, str]:
    """Return the column of images, and why it was chosen.

    Raises:
        DataError: If there is none, or several of which none has a usual name.
    """
    kinds: list[Callable[[str, Any], bool]] = [
        lambda column, feature: isinstance(feature, Image),
        lambda column, feature: _holds_bytes(feature),
        lambda column, feature: column in IMAGE_NAMES and is_text(feature),
    ]
    return _pick(name, features, wanted, kinds, IMAGE_NAMES, "Image", "image_column")


def pick_label_column(name: str, features: dict[str, Any], wanted: str | None) -> tuple[str, str]:
    """Return the column of classes, and why it was chosen.

    Raises:
        DataError: If there is none, or several of which none has a usual name.
    """
    kinds: list[Callable[[str, Any], bool]] = [
        lambda column, feature: isinstance(feature, ClassLabel),
        lambda column, feature: column in LABEL_NAMES and is_plain(feature),
        # any plain one, if it is named
        *([lambda column, feature: column == wanted and is_plain(feature)] if wanted else []),
    ]
    return _pick(name, features, wanted, kinds, LABEL_NAMES, "ClassLabel", "label_column")


def pick_column(
    name: str, features: dict[str, Any], wanted: str | None, kind: type, option: str
) -> str:
    """Return the column of a type that an option names, or the only one.

    Raises:
        DataError: If there is none, or several and none is named.
    """
    return _pick(
        name,
        features,
        wanted,
        [lambda column, feature: isinstance(feature, kind)],
        (),
        kind.__name__,
        option,
    )[0]


def _pick(
    name: str,
    features: dict[str, Any],
    wanted: str | None,
    kinds: Sequence[Callable[[str, Any], bool]],
    usual: Sequence[str],
    title: str,
    option: str,
) -> tuple[str, str]:
    columns = ", ".join(
        f"{column} ({feature.dtype if isinstance(feature, Value) else type(feature).__name__})"
        for column, feature in features.items()
    )
    if wanted is not None:
        feature = features.get(wanted)
        if feature is not None and any(kind(wanted, feature) for kind in kinds):
            return wanted, "named"
        fault = "is not a column" if feature is None else f"is not of type {title}"
        raise DataError(f"{option}={wanted!r} {fault} in {name}; its columns are {columns}")
    for kind in kinds:
        found = [column for column, feature in features.items() if kind(column, feature)]
        named = [column for column in usual if column in found]
        if len(found) == 1:
            return found[0], f"the only one of type {title}"
        if named:
            return named[0], f"the usual name among {listed(found)}"
        if found:
            raise DataError(
                f"{name} has several columns of type {title}: {listed(found)}; name one by {option}"
            )
    raise NoColumnError(
        f"{name} has no column of type {title}; name one by {option}; its columns are {columns}"
    )


def is_integer(feature: Any) -> bool:
    """Tell whether a column, or a field of one, holds plain integers."""
    return isinstance(feature, Value) and "int" in feature.dtype


def is_text(feature: Any) -> bool:
    """Tell whether a column holds words."""
    return isinstance(feature, Value) and "string" in feature.dtype


def is_plain(feature: Any) -> bool:
    """Tell whether a column holds integers, words or truth values."""
    return (
        is_integer(feature)
        or is_text(feature)
        or (isinstance(feature, Value) and feature.dtype == "bool")
    )


def _holds_bytes(feature: Any) -> bool:
    """Tell whether a column holds encoded images as pandas writes them: bytes, perhaps a path."""
    if isinstance(feature, dict):
        return set(feature) <= {"bytes", "path"} and _holds_bytes(feature.get("bytes"))
    return isinstance(feature, Value) and "binary" in feature.dtype


def features_of(table: Table) -> dict[str, Any]:
    """Return a split's columns by name, also a stream's that does not tell before it is read."""
    return table.features if table.features is not None else table._resolve_features().features


def listed(names: Sequence[str]) -> str:
    """Return names as one line, cut where they are many."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

"""From a dataset's name to its rows: splits, columns, classes, and single images decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage

from gld_zoo.images import to_rgb

CHECKOUT = Path(__file__).resolve().parent.parent
Table = Any  # Dataset or IterableDataset, which share no base class


class DataError(ValueError):
    """The dataset is not what the recipe says; the message names the place and the remedy."""


class ImageSource:
    """A dataset that has been found: its splits, columns and classes, no image decoded yet.

    Args:
        name: Hub id, folder in hub layout or image folder; a relative path is looked up from the
            current folder, then from the checkout.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        image_column, label_column: Names of the columns; None takes the first of the right type.
        streaming: Read rows in order from where they lie instead of a local copy.

    Raises:
        DataError: If the dataset, a split or a column is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        train_split: str = "train",
        test_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
    ) -> None:
        splits = open_dataset(name, streaming)
        train, test = pick_splits(name, splits, train_split, test_split)
        features = splits[train].features
        if features is None:  # a stream that does not tell before it is read
            features = splits[train]._resolve_features().features
        image = pick_column(name, features, image_column, Image, "image_column")
        label = pick_column(name, features, label_column, ClassLabel, "label_column")
        self.name = name
        self.is_folder = find_folder(name) is not None
        self.label_names = _label_names(name, splits[train], features, label)
        self.train, self.test = (
            Rows(
                table=encoded(splits[split], image, label),
                image_column=image,
                label_column=label,
                classes=len(self.label_names),
                where=f"split {split!r} of {name}",
            )
            for split in (train, test)
        )


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """One split, its images still encoded; `numbers` are the rows' own where some were left out."""

    table: Table
    image_column: str
    where: str
    numbers: torch.Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows; for a stream, what the dataset's card says.

        Raises:
            DataError: If the card does not say it.
        """
        count = self.count()
        if count is None:
            raise DataError(
                f"{self.where} does not tell its number of rows (dataset_info in its card), which "
                "streaming needs; set train_images"
            )
        return count

    def count(self) -> int | None:
        """Return the number of rows; None for a stream whose card does not say it."""
        if isinstance(self.table, Dataset):
            return len(self.table)
        split = (self.table.info.splits or {}).get(str(self.table.split))
        return (split.num_examples or None) if split else None

    def place(self, row: int) -> str:
        """Return how people find a row: its number in the dataset, and the split."""
        number = row if self.numbers is None else int(self.numbers[row])
        return f"row {number} of {self.where}"

    def read(self, item: dict[str, Any], place: str) -> PILImage.Image:
        """Decode an image as `to_rgb` does.

        Args:
            item: The encoded image.
            place: What an error calls it.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            return to_rgb(Image().decode_example(item))
        except Exception as error:
            raise DataError(
                f"{place} is not a readable image ({type(error).__name__}: "
                f"{error}); remove or replace it"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Rows(ImageRows):
    """A split of images with a class each."""

    label_column: str
    classes: int

    def example(self, row: int, item: dict[str, Any]) -> tuple[PILImage.Image, int]:
        """Return a row's image and class; `labels` has checked the classes of all.

        Raises:
            DataError: If the image cannot be read.
        """
        return self.read(item[self.image_column], self.place(row)), item[self.label_column]

    def labels(self) -> torch.Tensor:
        """Return the class indices int64 `[rows]`, none of them out of range.

        Raises:
            DataError: If one is; it names the first such row.
        """
        column = self.table[self.label_column]
        labels = torch.tensor([-1 if label is None else label for label in column])
        wrong = ((labels < 0) | (labels >= self.classes)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise self.label_error(self.place(row), column[row], f" ({len(wrong)} such rows)")
        return labels.to(torch.int64)

    def hold_out(self, fraction: float, seed: int) -> tuple[Rows, Rows]:
        """Split the rows class by class: those to keep, and a `fraction` (rounded) held out.

        Of each class at least one row is held out and one is kept, if it has two.

        Raises:
            DataError: If no class has two.
        """
        labels = self.labels()
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.classes):
            rows = (labels == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            held[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
        if not held.any():
            raise DataError(f"{self.where} has no class of two images, so none can be held out")
        return self.select(~held), self.select(held)

    def select(self, chosen: torch.Tensor) -> Rows:
        """Return the rows where a mask `[rows]` is true."""
        numbers = chosen.nonzero().flatten()
        return replace(self, table=self.table.select(numbers.tolist()), numbers=numbers)

    def label_error(self, place: str, label: int | None, count: str = "") -> DataError:
        """Return the error for a label outside the classes."""
        return DataError(
            f"{place} has label {label}, outside 0 to {self.classes - 1}{count}; "
            "remove unlabelled rows or correct them"
        )


def find_folder(name: str) -> Path | None:
    """Return the folder that a dataset's name means, if any: from here, or from the checkout."""
    folders = (Path(name).expanduser(), CHECKOUT / name)
    return next((path for path in folders if path.is_dir()), None)


def open_dataset(name: str, streaming: bool = False) -> dict[str, Table]:
    """Find a dataset's splits by its hub id or folder, the latter also from the checkout.

    Raises:
        DataError: If it is not there or cannot be loaded.
    """
    folder = find_folder(name)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise DataError(
            f"dataset={name!r}: there is no such folder; give one that exists or a hub id ORG/NAME"
        )
    try:
        return load_dataset(str(folder) if folder else name, streaming=streaming)
    except Exception as error:
        reason = f"({type(error).__name__}: {error})"
        if folder:
            raise DataError(
                f"dataset={name!r} is neither in hub layout nor an image folder {reason}; it needs "
                "data/train-*.parquet or train/CLASS/IMAGE"
            ) from error
        raise DataError(
            f"dataset={name!r} is neither a folder nor could it be loaded from the hub {reason}; "
            "check the name and the network, or give a folder"
        ) from error


def encoded(table: Table, image: str, *others: str) -> Table:
    """Return some columns of a split, the image still encoded."""
    return table.select_columns([image, *others]).cast_column(image, Image(decode=False))


def pick_splits(
    name: str, splits: dict[str, Table], train: str, test: str | None
) -> tuple[str, str]:
    """Return the names of the splits to train and to measure on; None takes the usual ones.

    Raises:
        DataError: If one is not there.
    """
    wanted = [test] if test else ["test", "validation"]
    return _pick_split(name, splits, [train]), _pick_split(name, splits, wanted)


def _pick_split(name: str, splits: dict[str, Table], wanted: list[str]) -> str:
    for split in wanted:
        if split in splits:
            return split
    raise DataError(
        f"{name} has no split {' or '.join(map(repr, wanted))}; it has {', '.join(splits)}"
    )


def pick_column(
    name: str, features: dict[str, Any], wanted: str | None, kind: type, option: str
) -> str:
    """Return the column of a type that an option names, or the first one.

    Raises:
        DataError: If there is none.
    """
    columns = ", ".join(
        f"{column} ({type(feature).__name__})" for column, feature in features.items()
    )
    if wanted is None:
        for column, feature in features.items():
            if isinstance(feature, kind):
                return column
        raise DataError(
            f"{name} has no column of type {kind.__name__}; name one by {option}; its columns are "
            f"{columns}"
        )
    feature = features.get(wanted)
    if isinstance(feature, kind) or (kind is ClassLabel and is_integer(feature)):
        return wanted
    found = "is not a column" if feature is None else f"is not of type {kind.__name__}"
    raise DataError(f"{option}={wanted!r} {found} in {name}; its columns are {columns}")


def is_integer(feature: Any) -> bool:
    """Tell whether a column, or a field of one, holds plain integers."""
    return isinstance(feature, Value) and "int" in feature.dtype


def _label_names(name: str, table: Table, features: dict[str, Any], column: str) -> list[str]:
    feature = features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if isinstance(table, IterableDataset):
        raise DataError(
            f"label_column={column!r} of {name} holds plain integers, whose number of classes a "
            "stream does not tell; use streaming: false or a column of type ClassLabel"
        )
    largest = max((label for label in table[column] if label is not None), default=-1)
    return [str(i) for i in range(largest + 1)]

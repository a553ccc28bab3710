"""Rows of a dataset: images still encoded, decoded one at a time, and the classes of a split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from gld_zoo.images import to_rgb
from gld_zoo.training.common.errors import DataError

REMEDY = "; remove or replace it"  # of an image that cannot be read
DEPTH_SAMPLE = 32  # images of a split whose depth is looked at
Table = Any  # Dataset or IterableDataset, which share no base class


def file_of(image: dict[str, Any] | None) -> str:
    """Return the addition that names an encoded image's file, empty where none is known."""
    return f" (file {image['path']})" if image and image.get("path") else ""


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
        splits = self.table.info.splits or {}
        split = splits.get(str(self.table.split))
        if split is None and len(splits) == 1:  # of a table made here, which has no name
            (split,) = splits.values()
        return (split.num_examples or None) if split else None

    def note_of_depth(self) -> str | None:
        """Return a note if the images seem to hold 12 bits in 16; None for all others.

        A few are looked at, spread over the split, and of other images only the first. One such
        image may be dark, and a set of them may too: a note, no error.
        """
        if not isinstance(self.table, Dataset):
            return None
        largest = 0
        for row in range(0, len(self), max(1, len(self) // DEPTH_SAMPLE)):
            try:
                image = Image().decode_example(self.table[row][self.image_column])
            except Exception:  # which is told of where it is read
                return None
            if not image.mode.startswith("I"):
                return None
            largest = max(largest, int(np.asarray(image).max()))
        if not 255 < largest < 4096:
            return None
        return (
            f"the 16-bit images of {self.where} hold values up to {largest}, so they are read "
            "almost black; multiply them by 16, or write 8 bits"
        )

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
                f"{place}{file_of(item)} is not a readable image ({type(error).__name__}: "
                f"{error}){REMEDY}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Rows(ImageRows):
    """A split of images with a class each.

    `index` gives the class of a value in the column, where the values are not the classes' indices.
    """

    label_column: str
    classes: int
    index: dict[Any, int] | None = None

    def example(self, row: int, item: dict[str, Any]) -> tuple[PILImage.Image, int]:
        """Return a row's image and class; `labels` has checked the classes of all.

        Raises:
            DataError: If the image cannot be read.
        """
        label = self.class_of(item[self.label_column])
        return self.read(item[self.image_column], self.place(row)), cast(int, label)

    def class_of(self, value: Any) -> int | None:
        """Return the class of a value in the column of classes; None if it has none."""
        if self.index is not None:
            return self.index.get(value)
        return value if value is not None and 0 <= value < self.classes else None

    def labels(self) -> torch.Tensor:
        """Return the class indices int64 `[rows]`, none of them out of range.

        They are read once.

        Raises:
            DataError: If one is; it names the first such row.
        """
        return self._labels

    @cached_property
    def _labels(self) -> torch.Tensor:
        column = self.table[self.label_column][:]  # row by row it takes ten times as long
        found = column if self.index is None else map(self.index.get, column)
        labels = torch.tensor([-1 if label is None else label for label in found])
        wrong = ((labels < 0) | (labels >= self.classes)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise self.label_error(self.place(row), column[row], f" ({len(wrong)} such rows)")
        return labels.to(torch.int64)

    def counts(self) -> list[int]:
        """Return how many rows each class has.

        Raises:
            DataError: If a label is out of range.
        """
        return self.labels().bincount(minlength=self.classes).tolist()

    def hold_out(self, fraction: float, seed: int) -> tuple[Rows, Rows]:
        """Split the rows class by class: those to keep, and a `fraction` (rounded) held out.

        Of each class at least one row is held out and one is kept, if it has two.

        Raises:
            DataError: If no class has two.
        """
        held = drawn_by_class(self.labels(), self.classes, fraction, seed)
        if not held.any():
            raise DataError(f"{self.where} has no class of two images, so none can be held out")
        return self.select((~held).nonzero().flatten()), self.select(held.nonzero().flatten())

    def select(self, rows: torch.Tensor) -> Rows:
        """Return some rows, by their numbers here, in the order given."""
        numbers = rows if self.numbers is None else self.numbers[rows]
        return replace(self, table=self.table.select(rows.tolist()), numbers=numbers)

    def label_error(self, place: str, label: int | str | None, count: str = "") -> DataError:
        """Return the error for a label outside the classes."""
        classes = f"outside 0 to {self.classes - 1}" if self.index is None else "not a class"
        return DataError(
            f"{place} has label {label!r}, {classes}{count}; remove unlabelled rows or correct them"
        )


def drawn_by_class(labels: torch.Tensor, classes: int, fraction: float, seed: int) -> torch.Tensor:
    """Return which rows are drawn, bool `[N]`: a `fraction` (rounded) of each class.

    Of each class at least one row is drawn and one is not, if it has two.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        drawn[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return drawn

"""From a dataset's name to its rows: folder or hub, splits, columns and classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, Image, IterableDataset, Value

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import (
    NoColumnError,
    features_of,
    is_text,
    listed,
    pick_image_column,
    pick_label_column,
)
from gld_zoo.training.data.image_folder import sort_names
from gld_zoo.training.data.opening import find_folder, open_dataset, own_names, pick_splits
from gld_zoo.training.data.rows import Rows, Table

NO_LABEL = "no_label"
MEASURED = ("test", "validation")  # splits to measure on, by their usual names
HELD_OUT = "held-out"  # the split that a part of the training images makes
AUTO_FRACTION = 0.2


class ImageSource:
    """A dataset that has been found: its splits, columns and classes, no image decoded yet.

    Args:
        name: Hub id, folder in hub layout or image folder; a relative path is looked up from the
            current folder, or `gld_zoo/data/NAME` in the package.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        test_fraction: Share of the training split to hold out, class by class, as test split
            instead, always the same rows; 0 for none.
        image_column, label_column: Names of the columns; None takes the only one of the right type,
            or of several the one with a usual name.
        streaming: Read rows in order from where they lie instead of a local copy.
        needs_labels: Whether there must be a column of classes; without one all images are of one
            class that is none, and `is_labelled` is false.

    Raises:
        DataError: If the dataset, a split, a column or a class is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        test_fraction: float | Literal["auto"] = 0.0,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
        needs_labels: bool = True,
    ) -> None:
        opened = open_dataset(
            name, config, revision, streaming=streaming, needs_labels=needs_labels
        )
        self.name = name
        self.folder = find_folder(name)
        self.is_folder = self.folder is not None
        self.passed_over = opened.passed_over
        self.splits = list(opened.splits)
        test_fraction = _fraction(test_fraction, test_split, opened.splits)
        if test_fraction:
            _check_fraction(test_fraction, test_split)
            test_split = train_split
        train, test = pick_splits(name, opened.splits, train_split, test_split)
        self.test_split = HELD_OUT if test_fraction else test
        features = features_of(opened.splits[train])
        self.image_column, image_reason = pick_image_column(name, features, image_column)
        tables = {split: opened.splits[split] for split in (train, test)}
        self.is_labelled = True
        try:
            self.label_column, label_reason = pick_label_column(name, features, label_column)
        except NoColumnError:
            if needs_labels:
                raise
            self.is_labelled, self.label_column, label_reason = False, NO_LABEL, "none"
            tables = {split: _without_labels(table) for split, table in tables.items()}
        self.column_reasons = dict(image=image_reason, label=label_reason)
        names = {
            split: self._names_in(table, opened.files.get(split)) for split, table in tables.items()
        }
        self.label_names = self._class_names(names[train])
        self.train, self.test = (
            self._rows(tables[each], each, names[each]) for each in (train, test)
        )
        self._check_joined(names[train], names[test])
        if test_fraction:
            self.train, self.test = self.train.hold_out(test_fraction, 0)

    def _class_names(self, found: dict[Any, str]) -> list[str]:
        """Return the training split's class names in order, of which there must be two."""
        names = list(found.values())
        if len(names) < 2 and self.is_labelled:
            raise DataError(
                f"{self.name} has one class alone ({', '.join(names) or 'none'}) in column "
                f"{self.label_column!r}, and a classifier needs two; name another by label_column"
            )
        return names

    def _names_in(self, table: Table, file: str | None) -> dict[Any, str]:
        """Return the class names by value of a split's column of classes, in order."""
        feature = features_of(table)[self.label_column]
        if isinstance(feature, ClassLabel):
            return dict(enumerate(own_names(file, self.label_column) or feature.names))
        if isinstance(table, IterableDataset):
            raise DataError(
                f"label_column={self.label_column!r} of {self.name} is of type {feature.dtype}, "
                "whose classes a stream does not tell; use streaming: false or a column of type "
                "ClassLabel"
            )
        used = {label for label in table[self.label_column][:] if label is not None}
        if is_text(feature):
            return {name: name for name in sort_names(used)}
        return {value: str(value) for value in sorted(used)}

    def _rows(self, table: Table, split: str, names: dict[Any, str]) -> Rows:
        classes = {name: number for number, name in enumerate(self.label_names)}
        index = {value: classes[name] for value, name in names.items() if name in classes}
        same = index == {number: number for number in range(len(classes))}
        where = f"split {split!r} of {self.name}"
        return Rows(
            table=encoded(table, self.image_column, self.label_column, folder=self.folder),
            image_column=self.image_column,
            label_column=self.label_column,
            classes=len(classes),
            index=None if same and type(next(iter(names))) is int else index,  # True == 1
            where=where,
        )

    def _check_joined(self, train: dict[Any, str], test: dict[Any, str]) -> None:
        """Refuse a test split with classes that the training split does not name."""
        known = set(train.values())
        unknown = {value: name for value, name in test.items() if name not in known}
        if not unknown or isinstance(self.test.table, IterableDataset):
            return
        used = set(self.test.table[self.label_column][:])
        found = [name for value, name in unknown.items() if value in used]
        if found:
            raise DataError(
                f"{self.test.where} has {len(found)} classes that {self.train.where} has not: "
                f"{listed(found)}; remove their rows, or add them to the training split"
            )


def _fraction(
    fraction: float | Literal["auto"], test_split: str | None, splits: dict[str, Table]
) -> float:
    """Return the share of the training split to measure on; `auto` is none where a split is."""
    if fraction != "auto":
        return fraction
    return 0.0 if test_split or any(usual in splits for usual in MEASURED) else AUTO_FRACTION


def _without_labels(table: Table) -> Table:
    """Return a table with a column of one class, which stands for none."""
    if isinstance(table, IterableDataset):
        raise DataError("a stream without classes is not supported; use streaming: false")
    classes = [0] * len(table)
    return table.add_column(NO_LABEL, classes, feature=ClassLabel(names=["unlabelled"]))


def _check_fraction(fraction: float, test_split: str | None) -> None:
    if not 0 <= fraction < 1:
        raise DataError(f"test_fraction={fraction} must be at least 0 and below 1")
    if test_split:
        raise DataError(f"test_fraction takes the place of test_split={test_split!r}")


def open_source(options: Any) -> ImageSource:
    """Find the dataset that a recipe's options name, or a command's of the same names.

    Raises:
        DataError: If it, a split or a column is not there or not usable.
    """
    return ImageSource(
        options.dataset,
        config=options.dataset_config,
        revision=options.dataset_revision,
        train_split=options.train_split,
        test_split=options.test_split,
        test_fraction=options.test_fraction,
        image_column=options.image_column,
        label_column=options.label_column,
        streaming=getattr(options, "streaming", False),
        needs_labels=getattr(options, "needs_labels", True),
    )


def encoded(table: Table, image: str, *others: str, folder: Path | None = None) -> Table:
    """Return some columns of a split, the image still encoded.

    Args:
        table: The split.
        image: Its column of images, bytes, or paths below `folder`.
        *others: The other columns.
        folder: Where the dataset is, if it is a folder.
    """
    kept = table.select_columns([image, *others])
    feature = features_of(table)[image]
    if isinstance(feature, Value) and "string" in feature.dtype and folder is not None:
        paths = [path and str(folder / path) for path in table[image][:]]
        kept = kept.remove_columns(image).add_column(image, paths)
    return kept.cast_column(image, Image(decode=False))


def guessed_columns(columns: dict[str, str], reasons: dict[str, str]) -> list[str]:
    """Return what to tell of columns that were chosen by their usual names.

    Args:
        columns: Their names, by what they hold: `image` or `label`.
        reasons: Why each was taken, as an `ImageSource` holds it.
    """
    return [
        f"the {kind}s are column {column!r}, {reasons[kind]} (--{kind}_column names another)"
        for kind, column in columns.items()
        if reasons[kind].startswith("the usual")
    ]


def facts(source: ImageSource, empty: Sequence[str] = ()) -> list[str]:
    """Return at most two lines on what of a dataset is read otherwise than one might think."""
    columns = dict(image=source.image_column, label=source.label_column)
    words = guessed_columns(columns, source.column_reasons)
    if empty:
        words.append(f"no training image of {listed(empty)}")
    lines = ["; ".join(words)] if words else []
    if source.passed_over:
        lines.append(f"passed over: {counted(source.passed_over)}")
    return lines


def counted(reasons: dict[str, int]) -> str:
    """Return what was passed over in a folder, and how often, in words."""
    return ", ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items()))

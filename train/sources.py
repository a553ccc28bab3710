"""From a dataset's name to its rows: folder or hub, splits, columns and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Image, IterableDataset, Value, load_dataset

from rows import DataError, Rows, Table

CHECKOUT = Path(__file__).resolve().parent.parent


class ImageSource:
    """A dataset that has been found: its splits, columns and classes, no image decoded yet.

    Args:
        name: Hub id, folder in hub layout or image folder; a relative path is looked up from the
            current folder, then from the checkout.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        test_fraction: Share of the training split to hold out, class by class, as test split
            instead, always the same rows; 0 for none.
        image_column, label_column: Names of the columns; None takes the first of the right type.
            A column of classes may hold words, if it is named.
        streaming: Read rows in order from where they lie instead of a local copy.

    Raises:
        DataError: If the dataset, a split or a column is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        test_fraction: float = 0.0,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise DataError(f"test_fraction={test_fraction} must be at least 0 and below 1")
        splits = open_dataset(name, config, revision, streaming=streaming)
        if test_fraction:
            if test_split:
                raise DataError(f"test_fraction takes the place of test_split={test_split!r}")
            test_split = train_split
        elif test_split is None and not {"test", "validation"} & set(splits):
            raise DataError(
                f"{name} has no split to measure on, only {', '.join(splits)}; name one by "
                "test_split, or hold out a part of the training images by test_fraction"
            )
        train, test = pick_splits(name, splits, train_split, test_split)
        features = splits[train].features
        if features is None:  # a stream that does not tell before it is read
            features = splits[train]._resolve_features().features
        image = pick_column(name, features, image_column, Image, "image_column")
        label = pick_column(name, features, label_column, ClassLabel, "label_column")
        self.name = name
        self.is_folder = find_folder(name) is not None
        self.test_split = "held-out" if test_fraction else test
        self.label_names = _label_names(name, splits[train], features, label)
        words = isinstance(features[label], Value) and not is_integer(features[label])
        self.train, self.test = (
            Rows(
                table=encoded(splits[split], image, label),
                image_column=image,
                label_column=label,
                classes=len(self.label_names),
                words={word: i for i, word in enumerate(self.label_names)} if words else None,
                where=f"split {split!r} of {name}",
            )
            for split in (train, test)
        )
        if test_fraction:
            self.train, self.test = self.train.hold_out(test_fraction, 0)


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
    )


def find_folder(name: str) -> Path | None:
    """Return the folder that a dataset's name means, if any: from here, or from the checkout."""
    folders = (Path(name).expanduser(), CHECKOUT / name)
    return next((path for path in folders if path.is_dir()), None)


def open_dataset(
    name: str,
    config: str | None = None,
    revision: str | None = None,
    *,
    streaming: bool = False,
) -> dict[str, Table]:
    """Find a dataset's splits by its hub id or folder, the latter also from the checkout.

    Args:
        name: Hub id or folder.
        config: Name of one of its configs, if it has several.
        revision: Branch, tag or commit on the hub.
        streaming: Read rows from where they lie instead of a local copy.

    Raises:
        DataError: If it is not there or cannot be loaded.
    """
    folder = find_folder(name)
    if folder and revision:
        raise DataError(f"dataset_revision={revision!r} is for a hub id, and {folder} is a folder")
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise DataError(
            f"dataset={name!r}: there is no such folder; give one that exists or a hub id ORG/NAME"
        )
    try:
        return load_dataset(
            str(folder) if folder else name, config, revision=revision, streaming=streaming
        )
    except Exception as error:
        reason = f"({type(error).__name__}: {error})"
        if "config" in str(error).lower():
            raise DataError(f"dataset={name!r} {reason}; name one by dataset_config") from error
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
        f"{column} ({feature.dtype if isinstance(feature, Value) else type(feature).__name__})"
        for column, feature in features.items()
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
    plain = is_integer(feature) or (isinstance(feature, Value) and "string" in feature.dtype)
    if isinstance(feature, kind) or (kind is ClassLabel and plain):
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
            f"label_column={column!r} of {name} is of type {feature.dtype}, whose classes a stream "
            "does not tell; use streaming: false or a column of type ClassLabel"
        )
    used = {label for label in table[column][:] if label is not None}
    if is_integer(feature):
        return [str(i) for i in range(max(used, default=-1) + 1)]
    return sorted(used)

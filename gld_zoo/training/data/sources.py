"""From a dataset's name to its rows: folder or hub, splits, columns and classes."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import (
    ClassLabel,
    Image,
    IterableDataset,
    SplitDict,
    SplitInfo,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

import gld_zoo
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.image_folder import SPLITS, read_image_folder, sort_names
from gld_zoo.training.data.rows import Rows, Table

BESIDE_PACKAGE = Path(gld_zoo.__file__).resolve().parent.parent
IMAGE_NAMES = (
    "image",
    "img",
    "file_name",
    "path",
)  # columns by convention, the first that is there
LABEL_NAMES = ("label", "labels", "fine_label")
DATA_FILES = ("*.parquet", "*.arrow", "*.tar", "*.jsonl", "metadata.csv")
SHOWN = 10  # names in a message


@dataclass(frozen=True)
class Opened:
    """A dataset's splits as they were found.

    `passed_over` counts what was not read, by reason; `files` has a parquet file of each split,
    where there are some, whose own class names `datasets` does not give.
    """

    splits: dict[str, Table]
    passed_over: dict[str, int]
    files: dict[str, str] = field(default_factory=dict)


class ImageSource:
    """A dataset that has been found: its splits, columns and classes, no image decoded yet.

    Args:
        name: Hub id, folder in hub layout or image folder; a relative path is looked up from the
            current folder, then from the checkout.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        test_fraction: Share of the training split to hold out, class by class, as test split
            instead, always the same rows; 0 for none.
        image_column, label_column: Names of the columns; None takes the only one of the right type,
            or of several the one with a usual name.
        streaming: Read rows in order from where they lie instead of a local copy.

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
        test_fraction: float = 0.0,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise DataError(f"test_fraction={test_fraction} must be at least 0 and below 1")
        opened = open_dataset(name, config, revision, streaming=streaming)
        splits = opened.splits
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
        features = features_of(splits[train])
        self.name = name
        self.folder = find_folder(name)
        self.is_folder = self.folder is not None
        self.passed_over = opened.passed_over
        self.image_column, image_reason = pick_image_column(name, features, image_column)
        self.label_column, label_reason = pick_label_column(name, features, label_column)
        self.column_reasons = dict(image=image_reason, label=label_reason)
        self.splits = list(splits)
        self.test_split = "held-out" if test_fraction else test
        names = {
            split: self._names_in(splits[split], opened.files.get(split)) for split in {train, test}
        }
        self.label_names = _text(names[train])
        if len(self.label_names) < 2:
            raise DataError(
                f"{name} has one class alone ({', '.join(self.label_names) or 'none'}) in column "
                f"{self.label_column!r}, and a classifier needs two; name another by label_column"
            )
        self.train, self.test = (
            self._rows(splits[split], split, names[split]) for split in (train, test)
        )
        self._check_joined(names[train], names[test])
        if test_fraction:
            self.train, self.test = self.train.hold_out(test_fraction, 0)

    def _names_in(self, table: Table, file: str | None) -> dict[Any, str]:
        """Return the class names by value of a split's column of classes, in order."""
        feature = features_of(table)[self.label_column]
        if isinstance(feature, ClassLabel):
            return dict(enumerate(_own_names(file, self.label_column) or feature.names))
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
            index=None if same and isinstance(next(iter(names)), int) else index,
            where=where,
        )

    def _check_joined(self, train: dict[Any, str], test: dict[Any, str]) -> None:
        """Refuse a test split with classes that the training split does not name."""
        unknown = {value: name for value, name in test.items() if name not in set(_text(train))}
        if not unknown or isinstance(self.test.table, IterableDataset):
            return
        used = set(self.test.table[self.label_column][:])
        found = [name for value, name in unknown.items() if value in used]
        if found:
            raise DataError(
                f"{self.test.where} has {len(found)} classes that {self.train.where} has not: "
                f"{listed(found)}; remove their rows, or add them to the training split"
            )


def _text(names: dict[Any, str]) -> list[str]:
    return list(names.values())


def listed(names: Sequence[str]) -> str:
    """Return names as one line, cut where they are many."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def features_of(table: Table) -> dict[str, Any]:
    """Return a split's columns by name, also a stream's that does not tell before it is read."""
    return table.features if table.features is not None else table._resolve_features().features


def _own_names(file: str | None, column: str) -> list[str] | None:
    """Return the class names that a parquet file gives a column; None if it gives none.

    `datasets` takes those of one split for all.
    """
    if file is None:
        return None
    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(column, {})
    return list(feature["names"]) if isinstance(feature, dict) and feature.get("names") else None


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
    folders = (Path(name).expanduser(), BESIDE_PACKAGE / name)
    return next((path for path in folders if path.is_dir()), None)


def open_dataset(
    name: str,
    config: str | None = None,
    revision: str | None = None,
    *,
    streaming: bool = False,
) -> Opened:
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
    if folder and not config and not has_data_files(folder):
        splits, passed_over = read_image_folder(folder)
        if streaming:
            return Opened({key: _as_stream(split) for key, split in splits.items()}, passed_over)
        return Opened(dict(splits), passed_over)
    try:
        if folder and is_saved(folder):
            saved = load_from_disk(str(folder))
            return Opened(dict(saved) if isinstance(saved, dict) else dict(train=saved), {})
        tables = tables_of_paths(folder) if folder and not config else {}
        if tables:
            return Opened(dict(load_dataset("csv", data_files=tables, streaming=streaming)), {})
        loaded = load_dataset(
            str(folder) if folder else name, config, revision=revision, streaming=streaming
        )
    except Exception as error:
        raise _unusable(name, folder, error) from error
    return Opened(dict(loaded), {}, _own_files(folder, config) if folder else {})


def _unusable(name: str, folder: Path | None, error: Exception) -> DataError:
    """Return what to tell of a dataset that `datasets` could not load."""
    reason = f"({type(error).__name__}: {error})"
    refusals = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in refusals:
        return DataError(
            f"dataset={name!r}: its local copy cannot be written {reason}; set HF_HOME to a folder "
            "that can be, with room"
        )
    if "config" in str(error).lower():
        return DataError(f"dataset={name!r} {reason}; name one by dataset_config")
    if folder:
        return DataError(
            f"dataset={name!r} is neither in hub layout nor an image folder {reason}; it needs "
            "data/train-*.parquet or train/CLASS/IMAGE"
        )
    return DataError(
        f"dataset={name!r} is neither a folder nor could it be loaded from the hub {reason}; "
        "check the name and the network, or give a folder"
    )


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def has_data_files(folder: Path) -> bool:
    """Tell whether a folder holds tables, metadata of images or a card that names its files."""
    card = folder / "README.md"
    if is_saved(folder) or (
        card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")
    ):
        return True
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return bool(tables_of_paths(folder)) or any(
        any(place.glob(pattern)) for place in places for pattern in DATA_FILES
    )


def tables_of_paths(folder: Path) -> dict[str, str]:
    """Return a folder's CSV files of images' paths and classes by split; one is the training's."""
    tables = {
        SPLITS.get(path.stem.lower(), path.stem): str(path)
        for path in sorted(folder.glob("*.csv"))
        if path.name != "metadata.csv" and _names_images(path)
    }
    return dict(train=next(iter(tables.values()))) if len(tables) == 1 else tables


def _names_images(path: Path) -> bool:
    """Tell whether a CSV file has a column of images and one of classes."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        header = next(csv.reader(file), [])
    return bool(set(IMAGE_NAMES) & set(header)) and bool(set(LABEL_NAMES) & set(header))


def _as_stream(split: Any) -> IterableDataset:
    name, count = str(split.split), len(split)
    stream = split.to_iterable_dataset(num_shards=min(64, count))
    stream.info.splits = SplitDict({name: SplitInfo(name, num_examples=count)})
    return stream


def _own_files(folder: Path, config: str | None) -> dict[str, str]:
    """Return the first parquet file of each split of a folder in hub layout."""
    files = load_dataset_builder(str(folder), config).config.data_files or {}
    first = {str(split): str(paths[0]) for split, paths in files.items() if paths}
    return {split: path for split, path in first.items() if path.endswith(".parquet")}


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
            return named[0], f"by its name, of {listed(found)}"
        if found:
            raise DataError(
                f"{name} has several columns of type {title}: {listed(found)}; name one by {option}"
            )
    raise DataError(
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


def facts(source: ImageSource, empty: Sequence[str] = ()) -> list[str]:
    """Return at most two lines on what of a dataset is read otherwise than one might think."""
    words = [
        f"column {column!r} of {kind}s, {source.column_reasons[kind]}"
        for kind, column in (("image", source.image_column), ("label", source.label_column))
        if source.column_reasons[kind].startswith("by")
    ]
    if empty:
        words.append(f"no training image of {listed(empty)}")
    lines = ["; ".join(words)] if words else []
    if source.passed_over:
        passed = (f"{count} of {reason}" for reason, count in sorted(source.passed_over.items()))
        lines.append(f"passed over: {', '.join(passed)}")
    return lines

"""From a dataset's name to its splits as they were found, on the hub or in a folder."""

from __future__ import annotations

import csv
import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import (
    IterableDataset,
    SplitDict,
    SplitInfo,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

import gld_zoo
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import IMAGE_NAMES, LABEL_NAMES
from gld_zoo.training.data.image_folder import SPLITS, read_image_folder
from gld_zoo.training.data.rows import Table

DATA_FILES = ("*.parquet", "*.arrow", "*.tar", "*.jsonl", "metadata.csv")
BESIDE_PACKAGE = Path(gld_zoo.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Opened:
    """A dataset's splits as they were found.

    `passed_over` counts what was not read, by reason; `files` has a parquet file of each split,
    where there are some, whose own class names `datasets` does not give.
    """

    splits: dict[str, Table]
    passed_over: dict[str, int]
    files: dict[str, str] = field(default_factory=dict)


def open_dataset(
    name: str,
    config: str | None = None,
    revision: str | None = None,
    *,
    streaming: bool = False,
    needs_labels: bool = True,
) -> Opened:
    """Find a dataset's splits by its hub id or folder, the latter also beside the package.

    Args:
        name: Hub id or folder.
        config: Name of one of its configs, if it has several.
        revision: Branch, tag or commit on the hub.
        streaming: Read rows from where they lie instead of a local copy.
        needs_labels: Whether an image folder must have classes.

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
        splits, passed_over = read_image_folder(folder, needs_labels=needs_labels)
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


def pick_splits(
    name: str, splits: dict[str, Table], train: str, test: str | None
) -> tuple[str, str]:
    """Return the names of the splits to train and to measure on.

    Args:
        name: The dataset's.
        splits: By name.
        train: The one to train on.
        test: The one to measure on; None takes 'test', else 'validation'.

    Raises:
        DataError: If one is not there.
    """
    if test is None:
        test = next((usual for usual in ("test", "validation") if usual in splits), None)
    if test is None:
        raise DataError(
            f"{name} has no split to measure on, only {', '.join(splits)}; name one by "
            "test_split, or hold out a part of the training images by test_fraction"
        )
    for split in (train, test):
        if split not in splits:
            raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    return train, test


def find_folder(name: str) -> Path | None:
    """Return the folder that a dataset's name means, if any.

    A relative one is looked up from here; `gld_zoo/data/NAME` is the package's own from anywhere.
    """
    folders = [Path(name).expanduser()]
    if folders[0].parts[:2] == ("gld_zoo", "data"):
        folders.append(BESIDE_PACKAGE / name)
    return next((path for path in folders if path.is_dir()), None)


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


def is_image_folder(name: str) -> bool:
    """Tell whether a dataset's name means a folder of images, without tables or metadata."""
    folder = find_folder(name)
    return folder is not None and not has_data_files(folder)


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


def own_names(file: str | None, column: str) -> list[str] | None:
    """Return the class names that a parquet file gives a column; None if it gives none.

    `datasets` takes those of one split for all.
    """
    if file is None:
        return None
    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(column, {})
    return list(feature["names"]) if isinstance(feature, dict) and feature.get("names") else None

"""Image folders as their owners lay them out: splits, classes, and what is passed over.

    FOLDER/train/CLASS/.../IMAGE and FOLDER/test/CLASS/.../IMAGE, or FOLDER/CLASS/.../IMAGE

A split is the first folder, a class the folder below it, and what lies deeper is walked, links
followed. These are torchvision's `ImageFolder` rules, with splits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit

from gld_zoo.images import image_extensions, is_system_file, is_system_folder
from gld_zoo.training.common.errors import DataError

SPLITS = dict(
    train="train",
    training="train",
    test="test",
    val="validation",
    valid="validation",
    validation="validation",
    dev="validation",
)
LAYOUT = "the layout is train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE without splits"


@dataclass
class Found:
    """Images by split and class, and how many entries were passed over, by reason."""

    images: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)


class NoClassesError(DataError):
    """A folder's images do not lie in folders of their classes, or there is one class alone."""


def read_image_folder(
    folder: Path, *, needs_labels: bool = True
) -> tuple[DatasetDict, dict[str, int]]:
    """Return an image folder's splits, with columns `image` and `label`, and what was passed over.

    No image is opened.

    Args:
        folder: Where it is.
        needs_labels: Whether there must be classes; else, where there are none, all images below
            the folder or those of its splits are found, without a column `label`.

    Raises:
        DataError: If the layout is another one; it names the file or folder.
    """
    try:
        found = list_images(folder)
        names = sort_names(name for classes in found.images.values() for name in classes)
        if len(names) == 1:
            raise NoClassesError(_one_class(folder, names[0]))
    except NoClassesError:
        if needs_labels:
            raise
        return _read_unlabelled(folder)
    _check_joined(folder, found)
    features = Features(image=Image(), label=ClassLabel(names=names))
    index = {name: number for number, name in enumerate(names)}
    splits = {}
    for split, classes in found.images.items():
        rows = sorted((path, index[name]) for name, paths in classes.items() for path in paths)
        columns = dict(image=[path for path, _ in rows], label=[label for _, label in rows])
        try:
            splits[split] = Dataset.from_dict(columns, features=features, split=NamedSplit(split))
        except UnicodeEncodeError as error:
            raise DataError(
                f"{folder} holds a name that is not UTF-8 ({error.object!r}); rename it"
            ) from error
    return DatasetDict(splits), dict(found.passed_over)


def _read_unlabelled(folder: Path) -> tuple[DatasetDict, dict[str, int]]:
    found = Found()
    folders, _ = _entries(str(folder), Found())
    places = _split_folders(folders) or dict(train=str(folder))
    splits = {}
    for split, path in places.items():
        images = sorted(_walk(path, found, ()))
        columns, features = dict(image=images), Features(image=Image())
        splits[split] = Dataset.from_dict(columns, features=features, split=NamedSplit(split))
    return DatasetDict(splits), dict(found.passed_over)


def _check_joined(folder: Path, found: Found) -> None:
    """Refuse classes that the training split has not."""
    known = found.images.get("train", {})
    for split, classes in found.images.items():
        unknown = sort_names(set(classes) - set(known))
        if known and unknown:
            raise DataError(
                f"the {split} split of {folder} has {len(unknown)} classes that its training split "
                f"has not: {', '.join(unknown[:10])}; add training images or remove them"
            )


def list_images(folder: Path) -> Found:
    """List the images of a folder by split and class.

    Raises:
        DataError: If an image lies where no class is, or no image is found.
    """
    found = Found()
    folders, files = _entries(str(folder), found)
    splits = _split_folders(folders)
    if splits:
        for entry in set(folders.values()) - set(splits.values()):
            found.passed_over[f"folder beside the splits: {Path(entry).name}"] += 1
        if files:
            found.passed_over["image beside the splits"] = len(files)
        for split, path in splits.items():
            if classes := _classes(path, found):
                found.images[split] = classes
    else:
        found.images["train"] = _classes(str(folder), found, entries=(folders, files))
    if not any(found.images.values()):
        raise DataError(f"{folder} holds no image; {LAYOUT}")
    return found


def _split_folders(folders: dict[str, str]) -> dict[str, str]:
    """Return the folders that are splits by their names, if one holds classes or all are so named.

    A class may have such a name too: beside others, and with images in it instead of folders.
    """
    splits: dict[str, str] = {}
    for name, path in folders.items():
        split = SPLITS.get(name.lower())
        if split in splits:
            raise DataError(
                f"{splits[split]} and {path} are both the split {split!r}; join them or rename one"
            )
        if split is not None:
            splits[split] = path
    splits = {name: splits[name] for name in dict.fromkeys(SPLITS.values()) if name in splits}
    others = set(folders.values()) - set(splits.values())
    if not others or ("train" in splits and any(map(_holds_classes, splits.values()))):
        return splits
    return {}


def _holds_classes(path: str) -> bool:
    quiet = Found()
    folders, _ = _entries(path, quiet)
    return any(next(_walk(each, quiet, ()), None) for each in folders.values())


def _classes(
    path: str, found: Found, entries: tuple[dict[str, str], list[str]] | None = None
) -> dict[str, list[str]]:
    """Return the images of each class folder of a split."""
    folders, files = entries or _entries(path, found)
    if files:
        raise NoClassesError(
            f"{files[0]} lies beside the class folders of {path} (such images: {len(files)}); put "
            f"each into the folder of its class: {LAYOUT}"
        )
    classes = {}
    for name, each in folders.items():
        images = list(_walk(each, found, (os.path.realpath(path),)))
        if images:
            classes[name] = images
        else:
            found.passed_over[f"folder without an image: {name}"] += 1
    return classes


def _walk(path: str, found: Found, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the images below a folder, links followed.

    Raises:
        DataError: If a link leads back to a folder above it.
    """
    real = os.path.realpath(path)
    if real in above:
        raise DataError(f"{path} is a link to a folder that it lies in ({real}); remove it")
    folders, files = _entries(path, found)
    yield from files
    for each in folders.values():
        yield from _walk(each, found, (*above, real))


def _entries(path: str, found: Found) -> tuple[dict[str, str], list[str]]:
    """Return a folder's folders by name and its images; count the rest."""
    folders, files = {}, []
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                ending = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    if is_system_folder(entry.name):
                        found.passed_over["system folder"] += 1
                    else:
                        folders[entry.name] = entry.path
                elif is_system_file(entry.name):
                    found.passed_over["system file"] += 1
                elif not entry.is_file():
                    raise DataError(f"{entry.path} leads to no file; remove it or mend the link")
                elif ending in image_extensions():
                    files.append(entry.path)
                else:
                    found.passed_over[f"no image ({ending or 'no ending'})"] += 1
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; allow it or move it") from error
    return folders, files


def sort_names(names: object) -> list[str]:
    """Return class names in order: numbers as numbers if all are, else as text; each once."""
    unique = set(names)  # type: ignore[call-overload]
    if all(name.lstrip("-").isdecimal() and name.isascii() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def _one_class(folder: Path, name: str) -> str:
    inner = folder / name
    deeper = [path.name for path in inner.iterdir() if path.is_dir()] if inner.is_dir() else []
    if len(deeper) > 1:
        return (
            f"{folder} holds one class folder alone, {name!r}, and that holds "
            f"{', '.join(sorted(deeper)[:4])}: give {inner} as the dataset, or if {name!r} is a "
            f"class, add another; {LAYOUT}"
        )
    return f"{folder} has one class alone, {name!r}, and a classifier needs two; {LAYOUT}"

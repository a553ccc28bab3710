"""What a run would read of a dataset: splits, columns, classes, sizes, and what is odd."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets import Image

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import features_of, listed
from gld_zoo.training.data.detection_rows import DetectionSource, as_lists
from gld_zoo.training.data.opening import open_dataset
from gld_zoo.training.data.rows import REMEDY, ImageRows
from gld_zoo.training.data.segmentation_rows import IGNORE, SegmentationSource
from gld_zoo.training.data.sources import open_source

SAMPLE = 200  # images of each split whose sizes and modes are looked at
CHUNK = 256  # encoded images in memory at a time


def report_on(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
    """Return what a run would read, and the rows of both of its splits by name.

    Args:
        options: With the names that `add_source_options` gives, and `duplicates`.

    Raises:
        DataError: If no run could use the dataset.
    """
    splits = open_dataset(options.dataset, options.dataset_config, options.dataset_revision).splits
    columns = features_of(next(iter(splits.values())))
    if "objects" in columns:
        found, rows = _describe_boxes(options)
    elif "mask" in columns:
        found, rows = _describe_masks(options)
    else:
        found, rows = _describe_classes(options)
    hashes = _hash_all(rows) if options.duplicates else {}
    result = dict(
        dataset=options.dataset,
        splits={name: len(table) for name, table in splits.items()},
        **found,
        seen={name: _look(part) for name, part in rows.items()},
    )
    notes = (part.note_of_depth() for part in rows.values())
    result["warnings"] += [note for note in notes if note]
    if options.duplicates:
        first, second = hashes
        known = set(hashes[first])
        count = sum(digest in known for digest in hashes[second])
        result["duplicates"] = count
        if count:
            result["warnings"].append(
                f"{count} images of {second} have the same pixels as one of {first}: scores are "
                "too good by them"
            )
    return result, rows


def _describe_classes(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
    source = open_source(options)
    rows = dict(zip(("train", source.test_split), (source.train, source.test), strict=True))
    counts = {
        name: dict(zip(source.label_names, part.counts(), strict=True))
        for name, part in rows.items()
    }
    warnings = [
        f"no image of {len(empty)} classes in {name}: {listed(empty)}"
        for name, by_class in counts.items()
        if (empty := [each for each, count in by_class.items() if not count])
    ]
    found = dict(
        kind="classes",
        classes=source.label_names,
        counts=counts,
        image_column=source.image_column,
        label_column=source.label_column,
        column_reasons=source.column_reasons,
        passed_over=source.passed_over,
        warnings=warnings,
    )
    return found, dict(rows)


def _describe_boxes(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
    source = DetectionSource(
        options.dataset,
        config=options.dataset_config,
        revision=options.dataset_revision,
        train_split=options.train_split,
        test_split=options.test_split,
        image_column=options.image_column,
        bbox_format=options.bbox_format,
    )
    rows = dict(zip(("train", "test"), (source.train, source.test), strict=True))
    counts, warnings = {}, []
    for name, part in rows.items():
        part.check()
        objects = [as_lists(each)["category"] for each in part.table[part.objects_column][:]]
        numbers = Counter(category for each in objects for category in each)
        counts[name] = {each: numbers[i] for i, each in enumerate(source.label_names)}
        if bare := sum(not each for each in objects):
            warnings.append(f"{bare} images of {name} have no object")
    found = dict(
        kind="boxes",
        classes=source.label_names,
        counts=counts,
        image_column=source.train.image_column,
        label_column=source.train.objects_column,
        passed_over={},
        warnings=warnings,
    )
    return found, dict(rows)


def _describe_masks(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
    source = SegmentationSource(
        options.dataset,
        256,
        config=options.dataset_config,
        revision=options.dataset_revision,
        train_split=options.train_split,
        test_split=options.test_split,
        image_column=options.image_column,
    )
    rows = dict(zip(("train", "test"), (source.train, source.test), strict=True))
    counts = {name: _pixels_by_value(part) for name, part in rows.items()}
    values = sorted({value for each in counts.values() for value in each if value != str(IGNORE)})
    warnings = []
    if len(values) < 2:
        warnings.append(
            f"the masks hold the values {', '.join(values)} beside {IGNORE}, which is ignored; two "
            "classes have the values 0 and 1"
        )
    found = dict(
        kind="masks",
        classes=sorted(values, key=int),
        counts=counts,
        image_column=source.train.image_column,
        label_column=source.train.mask_column,
        passed_over={},
        warnings=warnings,
    )
    return found, dict(rows)


def _pixels_by_value(rows: Any) -> dict[str, int]:
    """Return the pixels of each value in a sample of a split's masks."""
    counts: Counter[int] = Counter()
    for place in _sample(len(rows)):
        mask = Image().decode_example(rows.table[place][rows.mask_column])
        values, found = np.unique(np.asarray(mask), return_counts=True)
        counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    return {str(value): counts[value] for value in sorted(counts)}


def _sample(count: int) -> list[int]:
    """Return rows spread evenly over a split."""
    return [count * i // SAMPLE for i in range(SAMPLE)] if count > SAMPLE else [*range(count)]


def _look(rows: ImageRows) -> dict[str, Any]:
    """Return the sizes and modes of a sample of a split's images."""
    sizes, modes, kinds = [], Counter[str](), Counter[str]()
    places = _sample(len(rows))
    for place in places:
        item = rows.table[place][rows.image_column]
        rows.read(item, rows.place(place))  # whose error names the file
        image = Image().decode_example(item)
        sizes.append(image.size)
        modes[image.mode] += 1
        kinds[f"{image.width}x{image.height}"] += 1
    widths, heights = zip(*sizes, strict=True)
    return dict(
        images=len(places),
        smallest=f"{min(widths)}x{min(heights)}",
        largest=f"{max(widths)}x{max(heights)}",
        commonest=kinds.most_common(1)[0][0],
        modes=dict(modes),
    )


def _hash_all(rows: dict[str, ImageRows]) -> dict[str, list[bytes]]:
    """Return a hash of the pixels of each image of each split.

    Raises:
        DataError: If some cannot be read; it names all of them.
    """
    hashes: dict[str, list[bytes]] = {}
    broken: list[str] = []
    for name, part in rows.items():
        found = [*_hashes(part)]
        hashes[name] = [each for each in found if isinstance(each, bytes)]
        broken += [str(each).removesuffix(REMEDY) for each in found if isinstance(each, DataError)]
    if broken:
        told = "\n".join(f"  {each}" for each in broken)
        raise DataError(f"{len(broken)} of the images cannot be read; remove or replace:\n{told}")
    return hashes


def _hashes(rows: ImageRows) -> Iterable[bytes | DataError]:
    def digest(pair: tuple[int, Any]) -> bytes | DataError:
        try:
            image = rows.read(pair[1], rows.place(pair[0]))
        except DataError as error:
            return error
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), CHUNK):
            part = rows.table[start : start + CHUNK][rows.image_column]
            yield from pool.map(digest, enumerate(part, start))

"""Show what a run would read of a dataset: splits, columns, classes, and what is odd.

    python train/data.py DATASET
    python train/data.py DATASET --json facts.json --picture sheet.png

Boxes (a column `objects`) and masks (a column `mask`) are known by their columns. A dataset that no
run could use ends in an error and status 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure

from detection_data import DetectionSource, as_lists
from disk import DiskError, replacing, write_text
from evaluate import add_source_options
from gld_zoo.output import end, printing
from rows import DataError, ImageRows
from segmentation_data import IGNORE, SegmentationSource
from sources import features_of, listed, open_dataset, open_source

SAMPLE = 200  # images of each split whose sizes and modes are looked at
RARE = 10  # classes that the table shows
SHEET = 40  # images of the contact sheet
CHUNK = 256  # encoded images in memory at a time


def describe(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
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
    result = dict(
        dataset=options.dataset,
        splits={name: len(table) for name, table in splits.items()},
        **found,
        seen={name: _look(part) for name, part in rows.items()},
    )
    notes = (part.note_of_depth() for part in rows.values())
    result["warnings"] += [note for note in notes if note]
    if options.duplicates:
        count = _count_duplicates(*rows.values())
        result["duplicates"] = count
        if count:
            first, second = rows
            result["warnings"].append(
                f"{count} images of {second} have the same pixels as one of {first}: scores are "
                "too good by them"
            )
    return result, rows


def _describe_classes(options: Any) -> tuple[dict[str, Any], dict[str, ImageRows]]:
    source = open_source(options)
    rows = dict(zip(("train", source.test_split), (source.train, source.test), strict=True))
    counts = {name: _by_class(part.labels(), source.label_names) for name, part in rows.items()}
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


def _by_class(labels: Any, names: Sequence[str]) -> dict[str, int]:
    counts = labels.bincount(minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


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
        try:
            image = Image().decode_example(rows.table[place][rows.image_column])
        except Exception as error:  # of Pillow, or of the file
            raise DataError(
                f"{rows.place(place)} is not a readable image ({type(error).__name__}: {error}); "
                "remove or replace it"
            ) from error
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


def _count_duplicates(first: ImageRows, second: ImageRows) -> int:
    """Return how many images of a split have the very pixels of one of another."""
    known = set(_hashes(first))
    return sum(digest in known for digest in _hashes(second))


def _hashes(rows: ImageRows) -> Iterable[bytes]:
    def digest(pair: tuple[int, Any]) -> bytes:
        image = rows.read(pair[1], rows.place(pair[0]))
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), CHUNK):
            part = rows.table[start : start + CHUNK][rows.image_column]
            yield from pool.map(digest, enumerate(part, start))


def table(facts_: dict[str, Any], lines: Sequence[str]) -> str:
    """Return what was found as lines for people.

    Args:
        facts_: As `describe` returned it.
        lines: What `facts` says beside it.
    """
    splits = ", ".join(f"{name} {count:,}" for name, count in facts_["splits"].items())
    text = [f"{facts_['dataset']}: {facts_['kind']}; images {splits}"]
    text.append(f"columns: {facts_['image_column']} and {facts_['label_column']}")
    names, unit = (
        facts_["classes"],
        dict(boxes="boxes", masks="pixels").get(facts_["kind"], "images"),
    )
    text.append(f"{len(names)} classes: {listed(names)}")
    for split, counts in facts_["counts"].items():
        rare = sorted(counts.items(), key=lambda pair: pair[1])[:RARE]
        shown = ", ".join(f"{name} {count:,}" for name, count in rare)
        text.append(f"{unit} of the rarest classes in {split}: {shown}")
    for split, seen in facts_["seen"].items():
        modes = ", ".join(f"{mode} {count}" for mode, count in seen["modes"].items())
        text.append(
            f"sizes in {split}, {seen['images']} images seen: {seen['smallest']} to "
            f"{seen['largest']}, most often {seen['commonest']}; modes {modes}"
        )
    if "duplicates" in facts_:
        text.append(f"images that both splits hold: {facts_['duplicates']}")
    text += [*lines, *(f"warning: {warning}" for warning in facts_["warnings"])]
    return "\n".join(text)


def draw_sheet(rows: ImageRows, names: Sequence[str], title: str, path: Path) -> None:
    """Draw a contact sheet of a split: images spread over it, with their class where they have one.

    Args:
        rows: The split.
        names: Of the classes, where images have one each.
        title: Above the sheet.
        path: PNG to write.
    """
    places = (
        [len(rows) * i // SHEET for i in range(SHEET)] if len(rows) > SHEET else range(len(rows))
    )
    columns = 8
    lines = -(-len(places) // columns)
    figure = Figure(figsize=(columns * 1.3, lines * 1.5 + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, place in zip(axes.flat, places, strict=False):
        item = rows.table[place]
        ax.imshow(np.asarray(rows.read(item[rows.image_column], rows.place(place))))
        ax.set_title(_caption(rows, item, names), fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def _caption(rows: Any, item: dict[str, Any], names: Sequence[str]) -> str:
    if hasattr(rows, "objects_column"):
        return f"{len(as_lists(item[rows.objects_column])['category'])} objects"
    if hasattr(rows, "mask_column"):
        mask = np.asarray(Image().decode_example(item[rows.mask_column]))
        return f"values {mask.min()} to {mask.max()}"
    number = rows.class_of(item[rows.label_column])
    return "no class" if number is None else names[number]


@printing(failed=end)
def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_source_options(parser, positional=True)
    parser.add_argument("--bbox_format", type=str, default="xyxy", help="of boxes: xyxy or xywh")
    parser.add_argument(
        "--duplicates", type=bool, default=True, help="decode all images to find equal ones"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", type=str | None, help="print as JSON, or write it to a file"
    )
    parser.add_argument(
        "--picture",
        nargs="?",
        const=Path("contact_sheet.png"),
        type=Path | None,
        help="PNG of images with their classes; alone, contact_sheet.png",
    )
    options = parser.parse_args(arguments)
    try:
        found, rows = describe(options)
        text = json.dumps(found, indent=2)
        print(text if options.json == "-" else table(found, _told(found)))
        if options.json not in (None, "-"):
            write_text(Path(options.json), text + "\n")
        if options.picture:
            with replacing(options.picture) as temporary:
                names = found["classes"] if found["kind"] == "classes" else []
                draw_sheet(rows["train"], names, f"{found['dataset']}, train", temporary)
    except (DataError, DiskError) as error:
        sys.exit(f"error: {error}")


def _told(found: dict[str, Any]) -> list[str]:
    passed = [f"{count} of {reason}" for reason, count in sorted(found["passed_over"].items())]
    lines = [f"passed over: {', '.join(passed)}"] if passed else []
    for kind, reason in found.get("column_reasons", {}).items():
        if reason.startswith("by"):
            lines.append(f"the {kind} column was chosen {reason}")
    return lines


if __name__ == "__main__":
    cli()

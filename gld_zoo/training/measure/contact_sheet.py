"""The picture of a dataset: a sheet of its images with what they are labelled."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image
from matplotlib.figure import Figure

from gld_zoo.training.data.detection_rows import as_lists
from gld_zoo.training.data.rows import ImageRows

SHEET = 40  # images of the contact sheet
WIDE = 18  # letters of a line above an image


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
    name = "no class" if number is None else names[number].replace("_", " ")
    return "\n".join(textwrap.wrap(name, WIDE, max_lines=2, placeholder=" ..."))

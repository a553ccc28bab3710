"""What decides a teacher's rows, and the hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset

from gld_zoo.distillation.maps import grids_of
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.teaching.answers import Answers

VERSION = 1  # of the augmentation, the rows and their files; a change makes other stores
CHUNK = 1024  # encoded images in memory while they are hashed
# which compute and decode
VERSIONS = ("torch", "torchvision", "timm", "pillow")
# of the recipe, what an image's pixels follow from, beside the dataset and the seeds
OF_IMAGES = ("crop", "crop_padding", "crop_scale", "flip", "augment", "cutout", "erasing")


def ingredients(
    recipe: Recipe,
    rows: Rows,
    config: dict[str, Any],
    teacher: Any,
    answers: Answers,
    *,
    teacher_sha256: str,
    path: str,
    precision: str,
) -> dict[str, Any]:
    """Return all that decides a row, by name, as JSON holds it.

    Args:
        recipe: The run's options.
        rows: The training images, those held out left out.
        config: timm's data config of the student.
        teacher: The `Teacher`.
        answers: How its rows are kept.
        teacher_sha256: Hash of its weights and of what computes with them.
        path: How images reach the device, 'memory' or 'loader', which augment otherwise.
        precision: In which it runs.
    """
    own, own_std, theirs, their_std = teacher.statistics
    made_of = dict(
        version=VERSION,
        teacher=teacher_sha256,
        head=_head(teacher, rows, config),
        images=content_sha256(rows),
        count=len(rows),
        image_size=config["input_size"][-1],
        interpolation=config["interpolation"],
        mean=theirs,
        std=their_std,
        teacher_size=teacher.size,
        teacher_filter=teacher.filter if teacher.size else None,
        teacher_mean=own,
        teacher_std=own_std,
        augmentation={name: getattr(recipe, name) for name in OF_IMAGES},
        path=path,
        views=recipe.views,
        augment_seed=recipe.seed if recipe.augment_seed is None else recipe.augment_seed,
        grid=grids_of(recipe.grid),
        kept=dict(what=answers.what, dtype=answers.dtype, shape=answers.shape),
        precision=precision,
        versions={name: metadata.version(name) for name in VERSIONS},
    )
    return json.loads(json.dumps(made_of))  # tuples as lists, as they are read back


def _head(teacher: Any, rows: Rows, config: dict[str, Any]) -> dict[str, Any]:
    """Return what decides a teacher's head: one that is fitted follows from images and classes."""
    if teacher.kind == "own":
        places = None if teacher.columns is None else teacher.columns.tolist()
        return dict(kind="own", columns=places)
    if teacher.kind == "none":
        return dict(kind="none")
    labels = hashlib.sha256(repr(rows.labels().tolist()).encode()).hexdigest()
    measured = dict(crop_pct=config["crop_pct"], crop_mode=config.get("crop_mode"))
    return dict(kind="fit", labels=labels, classes=rows.classes, **measured)


def key_of(made_of: dict[str, Any]) -> str:
    """Return the hash of what decides the rows of a store."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Describe in what two stores differ, one each."""
    return [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]


def content_sha256(rows: Rows) -> str:
    """Return the hash of a split's encoded images, in order.

    Raises:
        DataError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for content in _contents(rows):
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _contents(rows: Rows) -> Iterable[bytes]:
    assert isinstance(rows.table, Dataset)
    for start in range(0, len(rows), CHUNK):
        for number, item in enumerate(rows.table[start : start + CHUNK][rows.image_column], start):
            content = item and item["bytes"]
            if content is None:
                try:
                    content = Path(item["path"]).read_bytes()
                except (OSError, TypeError):
                    rows.read(item, rows.place(number))  # which tells what is wrong with it
                    content = repr(item).encode()  # as of an address
            yield content

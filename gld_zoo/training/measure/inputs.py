"""A model to measure, and images as it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config

from gld_zoo.hub import is_run
from gld_zoo.training.build.create import create_frozen
from gld_zoo.training.build.refusals import check_takes
from gld_zoo.training.common.errors import DataError, ModelError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import EvalBatches, Share
from gld_zoo.training.data.loaders import eval_batches
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.data.sources import ImageSource, open_source


class Measured(NamedTuple):
    """A frozen model, timm's data config of it, and the side in pixels of the images it sees."""

    model: Any
    config: dict[str, Any]
    size: int


def build_measured(
    name: str,
    device: torch.device,
    *,
    image_size: int | None = None,
    label_names: Sequence[str] | None = None,
) -> Measured:
    """Build a model to measure, which takes images of that size.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.
        device: Where it runs.
        image_size: Side in pixels; None takes the model's.
        label_names: Classes of a dataset, which must be the model's; None takes it as it is.

    Raises:
        ModelError: If it cannot be built with its weights, has other classes, or refuses the size.
    """
    model = create_frozen(name, device, label_names=label_names)
    config = resolve_model_data_config(model)
    size = square_size(config, image_size)
    check_takes(name, model, size, device)
    return Measured(model, config, size)


def open_test_source(options: Any, names: Sequence[str]) -> ImageSource:
    """Find the dataset that options name, or that of the first run folder among some names.

    Args:
        options: As `add_source_options` gives a parser; `dataset` may be None.
        names: Of models.

    Raises:
        DataError: If it is not there or not usable, or nothing names one.
    """
    if options.dataset is not None:
        return open_source(options)
    found = next(filter(None, map(recipe_of, names)), None)
    if found is None:
        raise DataError(f"none of {', '.join(names)} is a run folder; name a --dataset")
    return open_source(found)


def recipe_of(name: str) -> Recipe | None:
    """Return the recipe of a run folder; None if a name is of something else."""
    return Recipe.load(Path(name) / "recipe.yaml") if is_run(name) else None


def square_size(config: dict[str, Any], image_size: int | None) -> int:
    """Return the side of a model's images in pixels: the one asked for, or its cfg's.

    Raises:
        ModelError: If its cfg has other images than square ones and no size is asked for.
    """
    height, width = config["input_size"][1:]
    if image_size is None and height != width:
        raise ModelError(
            f"the model's images are {height}x{width}, and only square ones are supported; choose "
            "a side by --image_size"
        )
    return image_size or width


def measuring_batches(
    rows: Rows,
    measured: Measured,
    device: torch.device,
    batch_size: int = 250,
    workers: int = 0,
) -> EvalBatches:
    """Return images as a model's cfg asks for them, of a side in pixels.

    Raises:
        DataError: If an image or a label cannot be used.
    """
    return eval_batches(
        rows,
        measured.config,
        measured.size,
        device,
        batch_size=batch_size,
        share=Share(),
        workers=workers,
        in_memory=False if workers else None,
    )

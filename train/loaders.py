"""Choose how a recipe's images reach the device, and build its batches."""

from __future__ import annotations

from typing import Any

import torch

from batches import (
    Data,
    EvalBatches,
    Normalize,
    Share,
    TrainBatches,
    Transforms,
    derive_seed,
)
from loader_path import LoaderBatches, StreamBatches, loader_eval
from recipe import Recipe
from rows import DataError, Rows
from sources import ImageSource
from tensor_path import TensorBatches, TensorEval, decode

MEMORY_LIMIT = 8 << 30


def open_source(recipe: Recipe) -> ImageSource:
    """Find a recipe's dataset.

    Raises:
        DataError: If it does not fit the recipe.
    """
    return ImageSource(
        recipe.dataset,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        train_split=recipe.train_split,
        test_split=recipe.test_split,
        test_fraction=recipe.test_fraction,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=recipe.streaming,
    )


def load_data(
    source: ImageSource,
    recipe: Recipe,
    config: dict[str, Any],
    device: torch.device,
    share: Share,
) -> Data:
    """Build a run's batches.

    Small sets that are cropped from a padded image are decoded once and kept on the device, all
    others are read as they are needed.

    Args:
        source: The dataset.
        recipe: The run's options.
        config: timm's data config of the student.
        device: Where the batches go.
        share: This process's part.

    Raises:
        DataError: If the dataset does not fit the recipe.
    """
    share.batch_size(recipe.batch_size)
    transforms = Transforms(
        size=config["input_size"][-1],
        interpolation=config["interpolation"],
        crop=recipe.crop,
        crop_padding=recipe.crop_padding,
        crop_scale=tuple(recipe.crop_scale),
        crop_pct=config["crop_pct"],
        flip=recipe.flip,
    )
    normalize = Normalize(config["mean"], config["std"], device)
    train, val = source.train, None
    if recipe.val_fraction:
        train, val = train.hold_out(recipe.val_fraction, derive_seed(recipe.seed))
    in_memory = fits_in_memory(source, recipe, transforms.size)

    def measured(rows: Rows) -> EvalBatches:
        return eval_batches(
            rows,
            transforms,
            normalize,
            batch_size=recipe.eval_batch_size,
            share=share,
            workers=recipe.workers,
            in_memory=in_memory,
        )

    options: dict[str, Any] = dict(batch_size=recipe.batch_size, seed=recipe.seed, share=share)
    if in_memory:
        split = decode(train, transforms.fit(), transforms.size)
        batches: TrainBatches = TensorBatches(
            split, normalize, crop_padding=recipe.crop_padding, flip=recipe.flip, **options
        )
    else:
        options.update(workers=recipe.workers)
        if recipe.streaming:
            options.update(count=recipe.train_images, buffer=recipe.shuffle_buffer)
        kind = StreamBatches if recipe.streaming else LoaderBatches
        batches = kind(train, transforms.training(), normalize, **options)
    return Data(batches, measured(source.test), measured(val) if val is not None else None)


def eval_batches(
    rows: Rows,
    transforms: Transforms,
    normalize: Normalize,
    *,
    batch_size: int,
    share: Share,
    workers: int = 0,
    in_memory: bool = True,
) -> EvalBatches:
    """Build the batches of a split to measure on.

    Args:
        rows: The split.
        transforms: How images are prepared.
        normalize: From pixels to floats, on the device that measures.
        batch_size: Images a step over all processes.
        share: This process's part.
        workers: Processes that read and transform, where not in memory.
        in_memory: Decode once and keep the images on the device.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, share=share)
    if not in_memory:
        return loader_eval(rows, transforms.measuring(), normalize, workers=workers, **options)
    split = decode(rows, transforms.measuring(), transforms.size).to(normalize.device)
    return TensorEval(split, normalize, **options)


def fits_in_memory(source: ImageSource, recipe: Recipe, size: int) -> bool:
    """Tell whether to decode a recipe's images once and keep them.

    Raises:
        DataError: If the recipe asks for it and it cannot be.
    """
    if recipe.in_memory is False or recipe.streaming:
        return False
    padded = size + 2 * recipe.crop_padding
    needed = 3 * (len(source.train) * padded**2 + len(source.test) * size**2)
    reason = None
    if recipe.crop != "padded":
        reason = f"crop={recipe.crop!r} takes parts of the original images"
    elif needed > MEMORY_LIMIT:
        reason = (
            f"{source.name} needs {needed / 2**30:.0f} GiB decoded at {size}x{size}, the limit is "
            f"{MEMORY_LIMIT / 2**30:.0f} GiB"
        )
    if reason and recipe.in_memory:
        raise DataError(f"in_memory=true, but {reason}; leave in_memory out")
    return reason is None

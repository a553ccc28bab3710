"""Choose how a recipe's images reach the device, and build its batches."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from batches import (
    Data,
    EvalBatches,
    Normalize,
    Share,
    TrainBatches,
    Transforms,
    derive_seed,
    measuring_transform,
)
from keyed_loader import KeyedBatches, KeyedEval, KeyedExamples, PixelsToDevice, stack
from recipe import Recipe
from rows import DataError, Rows
from sources import ImageSource
from stream_path import StreamBatches, StreamEval
from tensor_path import TensorBatches, TensorEval, decode

MEMORY_LIMIT = 8 << 30


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
        flip=recipe.flip,
    )
    normalize = Normalize(config["mean"], config["std"], device)
    train, val = source.train, None
    if recipe.val_fraction:
        train, val = train.hold_out(recipe.val_fraction, derive_seed(recipe.seed))
    in_memory = fits_in_memory(source, recipe, transforms.size, device)

    def measured(rows: Rows) -> EvalBatches:
        return eval_batches(
            rows,
            config,
            transforms.size,
            device,
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
    elif recipe.streaming:
        batches = StreamBatches(
            train,
            transforms.training(),
            normalize,
            count=recipe.train_images,
            buffer=recipe.shuffle_buffer,
            workers=recipe.workers,
            **options,
        )
    else:
        train.labels()  # all in range, or an error
        batches = KeyedBatches(
            KeyedExamples(train, transforms.training(), recipe.seed),
            stack,
            PixelsToDevice(normalize),
            workers=recipe.workers,
            pin=device.type == "cuda",
            **options,
        )
    return Data(batches, measured(source.test), measured(val) if val is not None else None)


def eval_batches(
    rows: Rows,
    config: dict[str, Any],
    size: int,
    device: torch.device,
    *,
    batch_size: int,
    share: Share,
    workers: int,
    in_memory: bool,
) -> EvalBatches:
    """Build the batches of a split to measure on.

    Args:
        rows: The split.
        config: timm's data config, which tells how images are prepared.
        size: Side in pixels.
        device: Where the batches go.
        batch_size: Images a step over all processes.
        share: This process's part.
        workers: Processes that read and transform, where not in memory.
        in_memory: Decode once and keep the images on the device.

    Raises:
        DataError: If a label, or in memory an image, cannot be used.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, share=share)
    transform = measuring_transform(config, size)
    normalize = Normalize(config["mean"], config["std"], device)
    if in_memory:
        split = decode(rows, transform, size).to(device)
        return TensorEval(split, normalize, **options)
    if not isinstance(rows.table, Dataset):
        return StreamEval(rows, transform, normalize, workers=workers, **options)
    rows.labels()  # all in range, or an error
    return KeyedEval(
        KeyedExamples(rows, transform, 0),
        stack,
        PixelsToDevice(normalize),
        workers=workers,
        pin=device.type == "cuda",
        **options,
    )


def fits_in_memory(source: ImageSource, recipe: Recipe, size: int, device: torch.device) -> bool:
    """Tell whether to decode a recipe's images once and keep them on the device.

    At most 8 GiB, and half a GPU's memory.

    Raises:
        DataError: If the recipe asks for it and it cannot be.
    """
    if recipe.in_memory is False or recipe.streaming:
        return False
    padded = size + 2 * recipe.crop_padding
    needed = 3 * (len(source.train) * padded**2 + len(source.test) * size**2)
    limit = MEMORY_LIMIT
    if device.type == "cuda":
        limit = min(limit, torch.cuda.get_device_properties(device).total_memory // 2)
    reason = None
    if recipe.crop != "padded":
        reason = f"crop={recipe.crop!r} takes parts of the original images"
    elif needed > limit:
        reason = (
            f"{source.name} needs {needed / 2**30:.0f} GiB decoded at {size}x{size}, the limit is "
            f"{limit / 2**30:.0f} GiB"
        )
    if reason and recipe.in_memory:
        raise DataError(f"in_memory=true, but {reason}; leave in_memory out")
    return reason is None

"""Choose how a recipe's images reach the device, and build its batches."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from datasets import Dataset

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import (
    Data,
    Drawing,
    EvalBatches,
    Normalize,
    Share,
    TrainBatches,
    Transforms,
    derive_seed,
    measuring_transform,
)
from gld_zoo.training.data.keyed import (
    KeyedBatches,
    KeyedEval,
    KeyedExamples,
    PixelsToDevice,
    stack,
)
from gld_zoo.training.data.memory import MemoryBatches, MemoryEval, decode
from gld_zoo.training.data.mixing import MixedBatches
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.data.stream import StreamBatches, StreamEval

MEMORY_LIMIT = 8 << 30  # bytes; by it alone the path is chosen, so that it is the same everywhere


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
    normalize = Normalize(config["mean"], config["std"], device)
    size = config["input_size"][-1]
    train, val = split_rows(source, recipe)
    in_memory = fits_in_memory(source, recipe, size, device)

    def measured(rows: Rows) -> EvalBatches:
        return eval_batches(
            rows,
            config,
            size,
            device,
            batch_size=recipe.eval_batch_size,
            share=share,
            workers=recipe.workers,
            in_memory=in_memory,
        )

    batches = train_batches(train, recipe, config, normalize, share, in_memory=in_memory)
    if recipe.mixes:
        batches = mixed(batches, recipe, len(source.label_names), share)
    return Data(batches, measured(source.test), measured(val) if val is not None else None)


def split_rows(source: ImageSource, recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Return the rows to train on, and those held out of them if a recipe asks for it."""
    if not recipe.val_fraction:
        return source.train, None
    return source.train.hold_out(recipe.val_fraction, derive_seed(recipe.seed))


def mixed(batches: TrainBatches, recipe: Recipe, classes: int, share: Share) -> TrainBatches:
    """Return batches whose images are mixed in pairs as a recipe says."""
    return MixedBatches(
        batches,
        classes=classes,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        share=share,
    )


def train_batches(
    rows: Rows,
    recipe: Recipe,
    config: dict[str, Any],
    normalize: Normalize,
    share: Share,
    *,
    in_memory: bool,
) -> TrainBatches:
    """Build the batches to train on, from memory, from a stream, or read row by row.

    Args:
        rows: The split.
        recipe: The run's options.
        config: timm's data config of the student.
        normalize: From pixels to floats.
        share: This process's part.
        in_memory: Decode once and keep the images on the device.

    Raises:
        DataError: If the split is smaller than a batch, or a label or an image cannot be used.
    """
    transforms = training_transforms(recipe, config, normalize)
    drawing = Drawing(recipe.seed, recipe.augment_seed, recipe.views)
    options: dict[str, Any] = dict(batch_size=recipe.batch_size, share=share)
    if in_memory:
        images = decode(rows, transforms.fit(), transforms.size, recipe.crop_padding)
        crops: dict[str, Any] = dict(crop_padding=recipe.crop_padding, flip=recipe.flip)
        crops.update(cutout=recipe.cutout, drawing=drawing)
        return MemoryBatches(images, normalize, **crops, **options)
    options["workers"] = recipe.workers
    if recipe.streaming:
        options.update(count=recipe.train_images, buffer=recipe.shuffle_buffer, seed=recipe.seed)
        return StreamBatches(rows, transforms.training(), normalize, **options)
    rows.labels()  # all in range, or an error
    alternate = recipe.flip == "alternate"
    return KeyedBatches(
        KeyedExamples(rows, transforms.training(), drawing.of_images, alternate=alternate),
        stack,
        PixelsToDevice(normalize),
        drawing=drawing,
        pin=normalize.device.type == "cuda",
        **options,
    )


def training_transforms(recipe: Recipe, config: dict[str, Any], normalize: Normalize) -> Transforms:
    """Return how a recipe's training images are cropped, mirrored and augmented.

    Raises:
        DataError: If its cutout would leave nothing of an image.
    """
    size = config["input_size"][-1]
    if recipe.cutout >= 2 * size:
        raise DataError(
            f"cutout={recipe.cutout} takes all of an image of {size} pixels, wherever its centre "
            "is; choose a smaller one"
        )
    return Transforms(
        size=size,
        interpolation=config["interpolation"],
        crop=recipe.crop,
        crop_padding=recipe.crop_padding,
        crop_scale=tuple(recipe.crop_scale),
        flip=recipe.flip is True,
        augment=recipe.augment,
        erasing=recipe.erasing,
        cutout=recipe.cutout,
        fill=tuple(normalize.mean_pixel.tolist()),
    )


def eval_batches(
    rows: Rows,
    config: dict[str, Any],
    size: int,
    device: torch.device,
    *,
    batch_size: int,
    share: Share,
    workers: int,
    in_memory: bool | None,
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
        in_memory: Decode once and keep the images on the device; None if they fit.

    Raises:
        DataError: If a label, or in memory an image, cannot be used.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, share=share)
    transform = measuring_transform(config, size)
    normalize = Normalize(config["mean"], config["std"], device)
    is_stream = not isinstance(rows.table, Dataset)
    if in_memory is None:
        in_memory = not is_stream and decoded_bytes(len(rows), size) <= memory_limit(device)
    if in_memory:
        split = decode(rows, transform, size).to(device)
        return MemoryEval(split, normalize, **options)
    if is_stream:
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


def decoded_bytes(count: int, size: int, padding: int = 0) -> int:
    """Return the bytes of decoded images with a border, all that is held of them at any time."""
    return 3 * count * (size + 2 * padding) ** 2


def memory_limit(device: torch.device) -> int:
    """Return how many bytes of decoded images a process may hold."""
    if device.type == "cuda":
        return min(MEMORY_LIMIT, torch.cuda.get_device_properties(device).total_memory // 2)
    return MEMORY_LIMIT


def fits_in_memory(source: ImageSource, recipe: Recipe, size: int, device: torch.device) -> bool:
    """Tell whether to decode a recipe's images once and keep them on the device.

    At most 8 GiB, and half a GPU's memory.

    Raises:
        DataError: If the recipe asks for it and it cannot be, or this machine has not the memory
            for the copy that each of its processes holds.
    """
    if recipe.in_memory is False or recipe.streaming:
        return False
    needed = decoded_bytes(len(source.train), size, recipe.crop_padding)
    needed += decoded_bytes(len(source.test), size)
    limit = memory_limit(device)
    reason = None
    if recipe.crop != "padded":
        reason = f"crop={recipe.crop!r} takes parts of the original images"
    elif recipe.augment != "none" or recipe.erasing:
        reason = "augment and erasing take images one by one"
    elif needed > limit:
        reason = (
            f"{source.name} needs {needed / 2**30:.0f} GiB decoded at {size}x{size}, the limit is "
            f"{limit / 2**30:.0f} GiB"
        )
    if reason and recipe.in_memory:
        raise DataError(f"in_memory=true, but {reason}; leave in_memory out")
    if reason is None:
        _check_copies(needed)
    return reason is None


def _check_copies(needed: int) -> None:
    """Refuse copies of decoded images, one a process of this machine, that it cannot hold."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    installed = psutil.virtual_memory().total
    if needed * processes > 0.8 * installed:
        raise DataError(
            f"{processes} processes would hold {needed * processes / 2**30:.1f} GiB of decoded "
            f"images on a machine of {installed / 2**30:.1f} GiB; set in_memory: false, or start "
            "fewer processes"
        )

"""From a dataset's name to batches on the device.

Small sets are decoded once to a uint8 tensor, then cropped, flipped and normalised as batches.
Which images form batch i of epoch e, and how each is augmented, depends on the seed alone: not on
the number of processes nor on where a run was resumed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

CHECKOUT = Path(__file__).resolve().parent.parent
MEMORY_LIMIT = 8 << 30


class DataError(ValueError):
    """The dataset is not what the recipe says; the message names the place and the remedy."""


@dataclass(frozen=True)
class Split:
    """Decoded images uint8 `[N, S, S, 3]` and their class indices int64 `[N]`."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Split:
        """Move both tensors."""
        return Split(self.images.to(device), self.labels.to(device))


class ImageSource:
    """A dataset that has been found: its splits, columns and classes, no image decoded yet.

    Args:
        name: Hub id, folder in hub layout or image folder; a relative path is looked up from the
            current folder, then from the checkout.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        image_column, label_column: Names of the columns; None takes the first of the right type.

    Raises:
        DataError: If the dataset, a split or a column is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        train_split: str = "train",
        test_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.name = name
        splits = _open(name)
        self.train_split = _pick_split(name, splits, [train_split])
        self.test_split = _pick_split(
            name, splits, [test_split] if test_split else ["test", "validation"]
        )
        self.splits = {split: splits[split] for split in (self.train_split, self.test_split)}
        train = splits[self.train_split]
        self.image_column = _pick_column(name, train, image_column, Image, "image_column")
        self.label_column = _pick_column(name, train, label_column, ClassLabel, "label_column")
        self.label_names = _label_names(train, self.label_column)

    def decode(self, image_size: int, interpolation: str = "bilinear") -> tuple[Split, Split]:
        """Decode the training and the test split.

        Args:
            image_size: Side in pixels; other sizes are resized by the shorter side and cropped at
                the centre.
            interpolation: How, as in a timm cfg.

        Raises:
            DataError: If an image cannot be read, a label is outside the classes, or memory would
                not suffice.
        """
        needed = sum(len(rows) for rows in self.splits.values()) * image_size * image_size * 3
        if needed > MEMORY_LIMIT:
            raise DataError(
                f"{self.name} needs {needed / 2**30:.0f} GiB decoded at {image_size}x{image_size}, "
                f"the limit is {MEMORY_LIMIT / 2**30:.0f} GiB; use a smaller image_size"
            )
        train, test = (self._decode_split(name, image_size, interpolation) for name in self.splits)
        return train, test

    def _decode_split(self, name: str, image_size: int, interpolation: str) -> Split:
        rows, where = self.splits[name], f"split {name!r} of {self.name}"
        labels = _labels(rows, self.label_column, len(self.label_names), where)
        return Split(_decode(rows, self.image_column, image_size, interpolation, where), labels)


def _open(name: str) -> dict[str, Dataset]:
    folders = [path for path in (Path(name).expanduser(), CHECKOUT / name) if path.is_dir()]
    if not folders and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise DataError(
            f"dataset={name!r}: there is no such folder; give one that exists or a hub id ORG/NAME"
        )
    try:
        return load_dataset(str(folders[0]) if folders else name)
    except Exception as error:
        reason = f"({type(error).__name__}: {error})"
        if folders:
            raise DataError(
                f"dataset={name!r} is neither in hub layout nor an image folder {reason}; it needs "
                "data/train-*.parquet or train/CLASS/IMAGE"
            ) from error
        raise DataError(
            f"dataset={name!r} is neither a folder nor could it be loaded from the hub {reason}; "
            "check the name and the network, or give a folder"
        ) from error


def _pick_split(name: str, splits: dict[str, Dataset], wanted: list[str]) -> str:
    for split in wanted:
        if split in splits:
            return split
    raise DataError(
        f"{name} has no split {' or '.join(map(repr, wanted))}; it has {', '.join(splits)}"
    )


def _pick_column(name: str, split: Dataset, wanted: str | None, kind: type, option: str) -> str:
    features = split.features
    columns = ", ".join(
        f"{column} ({type(feature).__name__})" for column, feature in features.items()
    )
    if wanted is None:
        for column, feature in features.items():
            if isinstance(feature, kind):
                return column
        raise DataError(
            f"{name} has no column of type {kind.__name__}; name one by {option}; its columns are "
            f"{columns}"
        )
    feature = features.get(wanted)
    if isinstance(feature, kind) or (kind is ClassLabel and _is_integer(feature)):
        return wanted
    found = "is not a column" if feature is None else f"is not of type {kind.__name__}"
    raise DataError(f"{option}={wanted!r} {found} in {name}; its columns are {columns}")


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype


def _label_names(split: Dataset, column: str) -> list[str]:
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    largest = max((label for label in split[column] if label is not None), default=-1)
    return [str(i) for i in range(largest + 1)]


def _labels(split: Dataset, column: str, classes: int, where: str) -> torch.Tensor:
    labels = torch.tensor(
        [-1 if label is None else label for label in split[column]], dtype=torch.int64
    )
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"row {row} of {where} has label {split[row][column]}, outside 0 to {classes - 1} "
            f"({len(wrong)} such rows); remove unlabelled rows or correct them"
        )
    return labels


def _decode(split: Dataset, column: str, size: int, interpolation: str, where: str) -> torch.Tensor:
    images = torch.empty((len(split), size, size, 3), dtype=torch.uint8)
    mode = InterpolationMode("bilinear" if interpolation == "random" else interpolation)

    def put(numbered: tuple[int, dict[str, Any]]) -> None:
        row, item = numbered
        try:
            image = _read(item)
        except Exception as error:
            raise DataError(
                f"row {row} of {where} is not a readable image ({type(error).__name__}: {error}); "
                "remove or replace it"
            ) from error
        if image.size != (size, size):
            image = tv.center_crop(tv.resize(image, [size], mode), [size, size])
        images[row] = tv.pil_to_tensor(image).permute(1, 2, 0)

    encoded = split.cast_column(column, Image(decode=False))[column]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(put, enumerate(encoded)):
            pass
    return images


def _read(item: dict[str, Any]) -> PILImage.Image:
    """Decode one image, upright and RGB; 16-bit grey is scaled to 8 bits, alpha is dropped."""
    source = io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]
    image = ImageOps.exif_transpose(PILImage.open(source))
    if image.mode.startswith("I"):  # convert would cut every value above 255 to white
        image = PILImage.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def derive_seed(*parts: int) -> int:
    """Hash integers to the 32 bits that torch's CPU generator takes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class TrainBatches:
    """Augmented, normalised batches of a decoded split.

    The epoch's order is a permutation drawn from (seed, epoch); crop and flip of image i are the
    i-th draw from (seed, epoch). Process r takes rows r::W of each global batch; the last,
    incomplete one is dropped.

    Args:
        split: Decoded images, on the device that trains.
        mean, std: Of the student's cfg, for pixels in 0 to 1.
        batch_size: Images a step over all processes.
        crop_padding: Black border in pixels for the random crop.
        flip: Mirror half of the images.
        seed: The recipe's seed.
        rank, world_size: Of this process.

    Raises:
        DataError: If the split is smaller than a batch, or the processes cannot share a batch
            equally.
    """

    def __init__(
        self,
        split: Split,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int,
        crop_padding: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise DataError(
                f"batch_size={batch_size} cannot be shared equally by {world_size} processes; "
                "use a multiple"
            )
        if len(split.labels) < batch_size:
            raise DataError(
                f"the training split has {len(split.labels)} images, fewer than "
                f"batch_size={batch_size}"
            )
        self.labels = split.labels
        self.size = split.images.shape[1]
        self.images = torch.nn.functional.pad(split.images, (0, 0, *[crop_padding] * 4))
        self.normalize = Normalize(mean, std, split.images.device)
        self.batch_size = batch_size
        self.crop_padding = crop_padding
        self.flip = flip
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images `[B, 3, S, S]` in channels-last layout and labels `[B]` of one epoch."""
        device = self.images.device
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        count = len(self.labels)
        order = torch.randperm(count, generator=generator).to(device)
        tops, lefts = torch.randint(2 * self.crop_padding + 1, (2, count), generator=generator).to(
            device
        )
        flips = (torch.rand(count, generator=generator) < 0.5).to(device) & self.flip
        offsets = torch.arange(self.size, device=device)
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size][
                self.rank :: self.world_size
            ]
            columns = (
                torch.where(flips[rows, None], self.size - 1 - offsets, offsets) + lefts[rows, None]
            )
            lines = tops[rows, None] + offsets
            pixels = self.images[
                rows[:, None, None], lines[:, :, None], columns[:, None, :]
            ]  # [B, S, S, 3]
            yield self.normalize(pixels), self.labels[rows]


def eval_batches(
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a process's share of a split, normalised, in order; nothing is dropped or padded."""
    normalize = Normalize(mean, std, split.images.device)
    images, labels = split.images[rank::world_size], split.labels[rank::world_size]
    share = max(1, batch_size // world_size)
    for pixels, target in zip(images.split(share), labels.split(share), strict=True):
        yield normalize(pixels), target


class Normalize:
    """Map uint8 `[B, S, S, 3]` to normalised float32 `[B, 3, S, S]`, channels last in memory."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return torch.addcmul(self.shift, pixels.float(), self.scale).permute(0, 3, 1, 2)

"""Images with masks: found, checked, augmented as DeepLab does, and batched."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import pick_column, pick_image_column
from gld_zoo.training.data.keyed import PixelsToDevice, Sample
from gld_zoo.training.data.opening import find_folder, open_dataset, pick_splits
from gld_zoo.training.data.orientation import UPRIGHT, orientation_of
from gld_zoo.training.data.rows import ImageRows
from gld_zoo.training.data.sources import encoded

IGNORE = 255
LOOKED_AT = 1000  # masks at most, before training; decoding them takes seconds
# how a mask of an image as it is stored comes to lie as the image is seen, by EXIF's orientations
# that change places of width and height
TURNS = {
    5: lambda mask: mask.T,
    6: lambda mask: mask.rot90(-1),
    7: lambda mask: mask.rot90(2).T,
    8: lambda mask: mask.rot90(1),
}


class SegmentationSource:
    """A dataset in hub layout with a column of masks: found, nothing decoded yet.

    A mask is an image of one channel, or with a palette, whose values are class indices; 255 is
    ignored. It lies as its image is seen. Where EXIF turns the image and the mask only fits it as
    it is stored, the mask is turned too; where its size fits both ways, the row is refused, unless
    the mask has a tag of its own.

    Args:
        name: Hub id or folder in hub layout.
        num_classes: Classes from 0.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        image_column: None takes the only one of images, of several the one of a usual name.
        mask_column: The masks'.

    Raises:
        DataError: If the dataset, a split or a column is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        image_column: str | None = None,
        mask_column: str = "mask",
    ) -> None:
        splits = open_dataset(name, config, revision).splits
        train, test = pick_splits(name, splits, train_split, test_split)
        features = splits[train].features
        mask = pick_column(name, features, mask_column, Image, "mask_column")
        others = {column: kind for column, kind in features.items() if column != mask}
        image, _ = pick_image_column(name, others, image_column)
        self.name, folder = name, find_folder(name)
        tables = {
            split: encoded(splits[split], image, mask, folder=folder) for split in (train, test)
        }
        self.train, self.test = (
            SegmentationRows(
                table=tables[split].cast_column(mask, Image(decode=False)),
                image_column=image,
                where=f"split {split!r} of {name}",
                mask_column=mask,
                classes=num_classes,
            )
            for split in (train, test)
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationRows(ImageRows):
    """A split of images with masks."""

    mask_column: str
    classes: int

    def check(self) -> str | None:
        """Look at masks, evenly spread over the split, until two classes have been seen.

        Of most datasets the first mask is enough.

        Returns:
            What to tell where there are more masks than are looked at, and these hold one class.

        Raises:
            DataError: If all masks together hold one class, or one is not usable.
        """
        rows = range(0, len(self), max(1, math.ceil(len(self) / LOOKED_AT)))
        masks, classes = self.table.select_columns([self.mask_column]), set()
        for row in rows:
            mask = self._mask(masks[row][self.mask_column], self.place(row))
            self._check_values(mask, self.place(row))
            classes |= set(mask.unique().tolist()) - {IGNORE}
            if len(classes) > 1:
                return None
        error = self.too_few(classes)
        if len(rows) == len(self):
            raise error
        return f"of {len(self):,} masks {len(rows):,} were looked at: {error}"

    def too_few(self, classes: Iterable[int]) -> DataError:
        """Return the error for masks that together hold less than two classes."""
        found = " and ".join(f"the value {value} alone" for value in classes) or "no value"
        return DataError(
            f"the masks of {self.where} hold {found} beside {IGNORE}, which is ignored, so that "
            f"any model is right; a mask of two classes has the values 0 and 1: write 1 for "
            f"{IGNORE} where it stands for a class"
        )

    def example(self, row: int, item: dict[str, Any]) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return an image uint8 `[3, H, W]` and its mask int64 `[H, W]`.

        Raises:
            DataError: If one cannot be read, their sizes differ, EXIF turns the image and the mask
                fits it both ways, or a value of the mask is neither a class nor 255.
        """
        place = self.place(row)
        image = v2.functional.pil_to_tensor(self.read(item[self.image_column], place))
        mask = self._mask(item[self.mask_column], place)
        turn = orientation_of(item[self.image_column])
        if turn != UPRIGHT and orientation_of(item[self.mask_column]) == UPRIGHT:
            mask = _laid_as_seen(mask, turn, image.shape[-2:], place)
        if mask.shape != image.shape[-2:]:
            sizes = " and its mask ".join(f"{w}x{h}" for h, w in (image.shape[-2:], mask.shape))
            raise DataError(f"{place}: the image is {sizes}; they must be of one size")
        self._check_values(mask, place)
        return tv_tensors.Image(image), tv_tensors.Mask(mask)

    def _check_values(self, mask: torch.Tensor, place: str) -> None:
        wrong = mask[((mask < 0) | (mask >= self.classes)) & (mask != IGNORE)]
        if len(wrong):
            raise DataError(
                f"{place} has a mask with value {int(wrong[0])}, which is neither one of "
                f"{self.classes} classes from 0 nor {IGNORE} for none; set num_classes or mend it"
            )

    def _mask(self, item: dict[str, Any] | None, place: str) -> torch.Tensor:
        if item is None:
            raise DataError(f"{place} has no mask; remove the row, or add one of {IGNORE} alone")
        try:
            values = np.asarray(Image().decode_example(item))
        except Exception as error:
            raise DataError(
                f"{place} has a mask that is not a readable image ({type(error).__name__}: {error})"
            ) from error
        if values.ndim != 2:
            raise DataError(
                f"{place} has a mask of {values.shape[-1]} channels; it needs one, of class indices"
            )
        if values.dtype.kind == "f":
            raise DataError(f"{place} has a mask of {values.dtype}; it needs integers, the classes")
        return torch.from_numpy(values.astype(np.int64))


def _laid_as_seen(mask: torch.Tensor, turn: int, seen: tuple[int, ...], place: str) -> torch.Tensor:
    """Return a mask as its image is seen, which EXIF turns.

    Annotation tools show an image turned, and programs that overlook EXIF do not, so a mask can be
    either; only where width and height change places and differ does its size tell.
    """
    stored = seen[::-1] if turn in TURNS else seen
    if mask.shape not in (seen, stored):
        return mask  # fits neither way, as the caller tells
    if stored == seen:
        height, width = seen
        raise DataError(
            f"{place}: EXIF (orientation {turn}) turns the image, and at {width}x{height} its mask "
            "fits before and after; write the image as it is to be seen, without the tag "
            "(PIL.ImageOps.exif_transpose), and its mask the same way up"
        )
    return TURNS[turn](mask) if mask.shape == stored else mask


def training_transform(size: int, mean: tuple[float, ...]) -> v2.Compose:
    """Return DeepLab's augmentation: a scale of 0.5 to 2, a random crop, a flip.

    Args:
        size: Side of the crop in pixels; at scale 1 the image fits into it.
        mean: Of the images, from 0 to 1, where an image is smaller than the crop.
    """
    fill = {
        tv_tensors.Image: [round(255 * value) for value in mean],
        tv_tensors.Mask: IGNORE,
        "others": 0,
    }
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), (0.5, 2.0), antialias=True),
            v2.RandomCrop((size, size), pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
        ]
    )


class MeasuringTransform:
    """Fit an image into a square of a side in pixels; its mask keeps its own size."""

    def __init__(self, size: int) -> None:
        self.resize = v2.Resize(size=None, max_size=size, antialias=True)

    def __call__(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Sample:
        """Return the image resized, and the mask."""
        return self.resize(image), mask


def collate_lists(samples: list[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return pixels uint8 `[1, H, W, 3]` and masks `[H, W]` of each image: sizes differ."""
    images, masks = zip(*samples, strict=True)
    return [image.permute(1, 2, 0)[None].contiguous() for image in images], list(masks)


class ListsToDevice(PixelsToDevice):
    """The same for a batch, and for lists of images of several sizes, each by itself."""

    def __call__(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return images `[B, 3, S, S]` and masks, or lists of images `[1, 3, H, W]` and masks."""
        pixels, masks = batch
        if not isinstance(pixels, list):
            return super().__call__(batch)
        images, masks = zip(*(self(pair) for pair in zip(pixels, masks, strict=True)), strict=True)
        return list(images), list(masks)

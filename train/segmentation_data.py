"""Images with masks: found, checked, augmented as DeepLab does, and batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from keyed_loader import PixelsToDevice, Sample
from rows import DataError, ImageRows
from sources import encoded, open_dataset, pick_column, pick_splits

IGNORE = 255


class SegmentationSource:
    """A dataset in hub layout with a column of masks: found, nothing decoded yet.

    A mask is an image of one channel, or with a palette, whose values are class indices; 255 is
    ignored.

    Args:
        name: Hub id or folder in hub layout.
        num_classes: Classes from 0.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        image_column: None takes the first of images.
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
        splits = open_dataset(name, config, revision)
        train, test = pick_splits(name, splits, train_split, test_split)
        features = splits[train].features
        mask = pick_column(name, features, mask_column, Image, "mask_column")
        others = {column: kind for column, kind in features.items() if column != mask}
        image = pick_column(name, others, image_column, Image, "image_column")
        self.name = name
        self.train, self.test = (
            SegmentationRows(
                table=encoded(splits[split], image, mask).cast_column(mask, Image(decode=False)),
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

    def example(self, row: int, item: dict[str, Any]) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return an image uint8 `[3, H, W]` and its mask int64 `[H, W]`.

        Raises:
            DataError: If one cannot be read, their sizes differ, or a value of the mask is neither
                a class nor 255.
        """
        place = self.place(row)
        image = v2.functional.pil_to_tensor(self.read(item[self.image_column], place))
        mask = self._mask(item[self.mask_column], place)
        if mask.shape != image.shape[-2:]:
            sizes = " and its mask ".join(f"{w}x{h}" for h, w in (image.shape[-2:], mask.shape))
            raise DataError(f"{place}: the image is {sizes}; they must be of one size")
        wrong = mask[((mask < 0) | (mask >= self.classes)) & (mask != IGNORE)]
        if len(wrong):
            raise DataError(
                f"{place} has a mask with value {int(wrong[0])}, which is neither one of "
                f"{self.classes} classes from 0 nor {IGNORE} for none; set num_classes or mend it"
            )
        return tv_tensors.Image(image), tv_tensors.Mask(mask)

    def _mask(self, item: dict[str, Any], place: str) -> torch.Tensor:
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


def listed(samples: list[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
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

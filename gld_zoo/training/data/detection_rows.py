"""Images with boxes: found, checked, augmented as SSD does, batched as torchvision takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import ClassLabel
from torchvision import tv_tensors
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import is_integer, pick_image_column
from gld_zoo.training.data.keyed import Sample, move
from gld_zoo.training.data.opening import find_folder, open_dataset, pick_splits
from gld_zoo.training.data.orientation import UPRIGHT, orientation_of
from gld_zoo.training.data.rows import ImageRows
from gld_zoo.training.data.sources import encoded

Format = Literal["xyxy", "xywh"]
LARGEST_FRACTION = 1.05  # of a box that reaches a little over its image's edge


class DetectionSource:
    """A dataset in hub layout with a column of boxes: found, no image decoded yet.

    The column holds for each image `bbox`, lists of four numbers in pixels, and `category`, class
    indices from 0; `difficult` or COCO's `iscrowd` (0 or 1) may be there. It is a dict of lists or
    a list of dicts; an image where it, or a list of it, is null has no boxes. Boxes are those of
    the image as it is seen: where EXIF turns it, as it lies after that.

    Args:
        name: Hub id or folder in hub layout.
        config, revision: Of a dataset that has several; None takes its only or default one.
        train_split, test_split: Names of the splits; None takes 'test', else 'validation'.
        image_column: None takes the only one of images, of several the one of a usual name.
        objects_column: The boxes'.
        bbox_format: 'xyxy' for corners, 'xywh' for a corner with width and height, as COCO has it.

    Raises:
        DataError: If the dataset, a split or a column is not there or not usable.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        test_split: str | None = None,
        image_column: str | None = None,
        objects_column: str = "objects",
        bbox_format: Format = "xyxy",
    ) -> None:
        splits = open_dataset(name, config, revision).splits
        train, test = pick_splits(name, splits, train_split, test_split)
        features = splits[train].features
        image, _ = pick_image_column(name, features, image_column)
        self.name = name
        self.label_names = _label_names(name, features, objects_column, splits[train])
        self.train, self.test = (
            DetectionRows(
                table=encoded(splits[split], image, objects_column, folder=find_folder(name)),
                image_column=image,
                where=f"split {split!r} of {name}",
                objects_column=objects_column,
                classes=len(self.label_names),
                bbox_format=bbox_format,
            )
            for split in (train, test)
        )


def _label_names(name: str, features: Any, column: str, table: Any) -> list[str]:
    if column not in features:
        raise DataError(
            f"objects_column={column!r} is not a column of {name}; it has {', '.join(features)}"
        )
    objects = getattr(features[column], "feature", features[column])  # a list of dicts, or a dict
    keys = list(objects) if isinstance(objects, dict) else []
    missing = [key for key in ("bbox", "category") if key not in keys]
    if missing:
        raise DataError(
            f"column {column!r} of {name} has no {' and no '.join(missing)}; it has "
            f"{', '.join(keys) or 'no fields at all'}"
        )
    category = getattr(objects["category"], "feature", objects["category"])
    if isinstance(category, ClassLabel):
        return list(category.names)
    if not is_integer(category):
        kind = getattr(category, "dtype", category)
        raise DataError(
            f"column {column!r} of {name} has categories of type {kind}; they must be class "
            "indices from 0: make them a ClassLabel or integers"
        )
    used = {category for row in table[column][:] for category in as_lists(row)["category"]}
    return [str(i) for i in range(max(used - {None}, default=-1) + 1)]


def as_lists(objects: Any) -> dict[str, list[Any]]:
    """Return a row's objects as a dict of lists, which may hold a list of dicts or nothing."""
    if not objects:
        return dict(bbox=[], category=[])
    if isinstance(objects, dict):
        return {key: values or [] for key, values in objects.items()}
    return {key: [one[key] for one in objects] for key in objects[0]}


@dataclass(frozen=True, kw_only=True)
class DetectionRows(ImageRows):
    """A split of images with boxes."""

    objects_column: str
    classes: int
    bbox_format: Format = "xyxy"

    def check(self) -> int:
        """Look at all boxes, without their images; return how many there are.

        Raises:
            DataError: If a category is out of range, a box is not four finite numbers or has a
                negative side, or there are not as many of each; it names the first such row. If
                there is no box of at least a pixel, or all seem to be fractions of their image.
        """
        rows = [as_lists(objects) for objects in self.table[self.objects_column][:]]
        self._check_scale([box for objects in rows for box in objects["bbox"] if box])
        found = [self.boxes(row, objects)[0] for row, objects in enumerate(rows)]
        boxes = torch.cat([torch.zeros(0, 4), *found])
        if not (boxes[:, 2:] - boxes[:, :2] >= 1).all(1).any():  # others are dropped
            raise DataError(
                f"{self.where} has {len(boxes)} boxes in column {self.objects_column!r}, none of "
                "them a pixel wide and high, so there is nothing to find; name another column by "
                "objects_column, or another split by train_split or test_split"
            )
        return len(boxes)

    def _check_scale(self, boxes: list[list[float | None]]) -> None:
        """Refuse boxes that, taken as pixels, would all be dropped as smaller than one."""
        numbers = [value for box in boxes for value in box if value is not None]
        if not any(numbers):  # boxes without area stand where there is no object
            return
        if min(numbers) >= 1 - LARGEST_FRACTION and max(numbers) <= LARGEST_FRACTION:
            raise DataError(
                f"the boxes of {self.where} lie between {min(numbers):g} and {max(numbers):g}, and "
                "are to be in pixels; they look like fractions: multiply them by the width and "
                "height of their image"
            )

    def boxes(self, row: int, objects: dict[str, list[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a row's corners x1, y1, x2, y2 `[N, 4]` and its classes `[N]` from 0.

        Raises:
            DataError: As `check` for a row.
        """
        categories, listed = objects["category"], objects["bbox"]
        for category in categories:
            if category is None or not 0 <= category < self.classes:
                raise DataError(
                    f"{self.place(row)} has a box of category {category}, outside 0 to "
                    f"{self.classes - 1}; correct it or remove the box"
                )
        lengths = {len(box or ()) for box in listed}
        if lengths - {4} or len(listed) != len(categories):
            raise DataError(
                f"{self.place(row)} has {len(listed)} boxes of {sorted(lengths)} numbers for "
                f"{len(categories)} categories; each needs four"
            )
        flags = _difficult(objects)
        if len(flags) != len(categories):
            raise DataError(
                f"{self.place(row)} has {len(flags)} values of difficult for {len(categories)} "
                "boxes; each needs one"
            )
        numbers = [math.nan if value is None else value for box in listed for value in box]
        boxes = torch.tensor(numbers, dtype=torch.float32).reshape(-1, 4)
        if not boxes.isfinite().all():
            raise DataError(f"{self.place(row)} has a box that is not finite: {boxes.tolist()}")
        if self.bbox_format == "xywh":
            boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        wrong = (boxes[:, 2:] < boxes[:, :2]).any(1)
        if wrong.any():
            box = listed[int(wrong.nonzero()[0])]
            raise DataError(
                f"{self.place(row)} has a box {box} of negative width or height as "
                f"{self.bbox_format}; set bbox_format to what the dataset has, or correct it"
            )
        return boxes, torch.tensor(categories, dtype=torch.int64)

    def example(self, row: int, item: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Return an image uint8 `[3, H, W]` and its target, as torchvision's detectors take it.

        `labels` are from 1, `iscrowd` is 1 for difficult objects.

        Raises:
            DataError: If the image cannot be read, EXIF turns it and a box does not lie inside it
                then, or as `check` for a row.
        """
        image = v2.functional.pil_to_tensor(self.read(item[self.image_column], self.place(row)))
        objects = as_lists(item[self.objects_column])
        boxes, categories = self.boxes(row, objects)
        turn = orientation_of(item[self.image_column])
        if turn != UPRIGHT:
            self._check_inside(row, boxes, image.shape[-2:], turn)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(
                boxes, format="XYXY", canvas_size=tuple(image.shape[-2:])
            ),
            labels=categories + 1,
            iscrowd=torch.tensor(_difficult(objects), dtype=torch.int64),
        )
        return tv_tensors.Image(image), target

    def _check_inside(
        self, row: int, boxes: torch.Tensor, size: tuple[int, ...], turn: int
    ) -> None:
        """Refuse boxes outside a turned image, which must be those of the image as stored."""
        height, width = size
        outside = (boxes < -1) | (boxes > torch.tensor([width, height] * 2) + 1)  # but for rounding
        if outside.any():
            box = boxes[int(outside.any(1).nonzero()[0])].tolist()
            raise DataError(
                f"{self.place(row)}: EXIF (orientation {turn}) turns the image, which is "
                f"{width}x{height} then, and the box of corners {box} does not lie inside; give "
                "boxes of the image as it is seen, or write it without the tag"
            )


def _difficult(objects: dict[str, list[Any]]) -> list[int]:
    """Return 1 for each object that is to be ignored when measuring, else 0."""
    flags = objects.get("difficult") or objects.get("iscrowd") or [0] * len(objects["category"])
    return [int(flag or 0) for flag in flags]


def training_transform(size: int, mean: list[float]) -> v2.Compose:
    """Return SSD's augmentation: colours, zoom out, a crop that keeps some object, flip, resize.

    Boxes are cut to their image; one of which less than a pixel is left is dropped.

    Args:
        size: Side in pixels that the image is resized to, whatever its proportions.
        mean: Of the images, from 0 to 1, round one that is zoomed out.
    """
    fill = {tv_tensors.Image: [255 * value for value in mean], "others": 0}
    return v2.Compose(
        [
            *_tidy(),  # a box outside its image could come to lie inside one zoomed out
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=fill),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.Resize((size, size), antialias=False),  # as the model resizes what it measures
            *_tidy(),
        ]
    )


def measuring_transform() -> v2.Compose:
    """Return the transform of images to measure on, which keep their size; the model resizes."""
    return v2.Compose(_tidy())


def _tidy() -> list[v2.Transform]:
    boxes = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_of_each_box)
    return [v2.ClampBoundingBoxes(), boxes]


def _of_each_box(inputs: tuple[Any, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs[1]["labels"], inputs[1]["iscrowd"]


def collate(samples: list[Sample]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return images and targets as lists: sizes differ."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class BoxesToDevice:
    """Move a batch to its device: images from 0 to 1, plain tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, batch: tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
    ) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Return the images and targets."""
        images, targets = batch
        moved = [
            {key: move(value, self.device) for key, value in target.items()} for target in targets
        ]
        return [move(image, self.device) / 255 for image in images], moved

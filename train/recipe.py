"""The recipe of a student, a teacher or a baseline."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """Which student learns from which teacher on what; the defaults are the paper's CIFAR-100."""

    GROUPS: ClassVar[dict[str, str]] = dict(
        student="models",
        dataset="dataset",
        image_size="images",
        in_memory="reading",
        grid="loss",
        **Options.GROUPS,
    )
    RANGES: ClassVar[dict[str, tuple[float, float]]] = dict(
        image_size=(1, math.inf),
        crop_padding=(0, math.inf),
        crop_pct=(0.01, 1),
        workers=(0, math.inf),
        shuffle_buffer=(1, math.inf),
        train_images=(1, math.inf),
        grid=(1, math.inf),
        alpha=(0, 1),
        beta=(0, math.inf),
        local_weight=(0, math.inf),
        **Options.RANGES,
    )

    student: str = option(
        dataclasses.MISSING,
        "model to train: timm name, hf-hub:ORG/NAME or local-dir:PATH",
    )
    teacher: str | None = option(
        None,
        "model to distil from: timm name, hf-hub:ORG/NAME or local-dir:PATH; null for labels alone",
    )
    finetune: Literal["all", "classifier"] | None = option(
        None,
        "start from the student's pretrained weights, with a new classifier if the classes differ, "
        "and train all of it or the classifier alone; null starts from random weights",
    )
    compile: bool = option(
        False, "compile the models with torch.compile: slower start, faster steps on most GPUs"
    )

    dataset: str = option("uoft-cs/cifar100", "hub id, folder in hub layout, or image folder")
    dataset_config: str | None = option(None, "name of one of the dataset's configs")
    dataset_revision: str | None = option(None, "branch, tag or commit on the hub")
    train_split: str = option("train", "split to train on")
    test_split: str | None = option(
        None, "split to measure on; null takes 'test', else 'validation'"
    )
    test_fraction: float = option(
        0.0,
        "share of the training images to measure on, class by class, where there is no such split; "
        "they are the same for every seed",
    )
    image_column: str | None = option(None, "column of images; null takes the first of that type")
    label_column: str | None = option(
        None, "column of classes, perhaps words; null takes the first of type ClassLabel"
    )
    val_fraction: float = option(
        0.0,
        "share of the training images held out, class by class; they are measured each epoch and "
        "select best/, and the test split is measured at the end alone",
    )

    image_size: int | None = option(
        None, "side of the square images in pixels; null takes the student's"
    )
    crop: Literal["padded", "resized"] = option(
        "padded",
        "random training crop: of the image with a border, or of a part of it, resized",
    )
    crop_padding: int = option(
        4, "black border in pixels round an image before its random crop; 0 for no crop"
    )
    crop_scale: list[float] = option(
        [0.08, 1.0], "smallest and largest part of the area that a resized crop takes, 0 to 1"
    )
    crop_pct: float = option(
        1.0, "share of the resized image's side that the centre crop keeps when measuring, 0 to 1"
    )
    flip: bool = option(True, "mirror half of the training images")

    in_memory: bool | None = option(
        None,
        "decode the images once and keep them on the device; null: if they fit in 8 GiB and half a "
        "GPU's memory",
    )
    workers: int = option(
        2,
        "processes that read images where they are not in memory, for training and for each split "
        "measured; their number decides the order of a stream",
        decides=False,
    )
    streaming: bool = option(False, "read the dataset in order from the hub, without a local copy")
    shuffle_buffer: int = option(10_000, "encoded images that a stream is shuffled over")
    train_images: int | None = option(
        None, "images of an epoch of a stream; null takes the number in the dataset's card"
    )

    grid: int = option(2, "cells along each side of the feature map, the paper's d")
    alpha: float = option(0.7, "share of the global distillation against cross-entropy, 0 to 1")
    beta: float = option(
        500.0, "weight of the relation, as it is: scale it by batch_size (1 + grid²) / 320"
    )
    local_weight: float = option(1.0, "weight of the local distillation")

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming them."""
        super().__post_init__()
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two parts of the area, the smaller first, "
                "between 0 and 1"
            )
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        if not self.streaming:
            self.refuse("is for streaming: true alone", "train_images", "shuffle_buffer")
        if self.crop == "padded":
            self.refuse("is for crop: resized alone", "crop_scale")
        else:
            self.refuse("is for crop: padded alone", "crop_padding")
        if self.streaming and (self.val_fraction or self.test_fraction or self.in_memory):
            raise ValueError(
                "streaming cannot be combined with val_fraction, test_fraction or in_memory"
            )

    @property
    def subject(self) -> str:
        """The name of the model that is trained."""
        return self.student

    def deciding(self) -> list[str]:
        """Return the names of the options that decide the result."""
        return [*super().deciding(), *(["workers"] if self.streaming else [])]

"""The recipe of a classifier: a student, a teacher or a baseline."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from gld_zoo.distillation.maps import count_cells
from gld_zoo.training.config.options import Options, option

PAPER_BETA, PAPER_ROWS = 500.0, 320  # of a batch of 64 images and grid 2


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

    # what decides nothing without a teacher
    OF_A_TEACHER: ClassVar[tuple[str, ...]] = (
        "teacher",
        "teacher_size",
        "teacher_head",
        "teacher_store",
        "store_dtype",
        "grid",
        "alpha",
        "beta",
        "local_weight",
        "ce_weight",
        "global_weight",
        "temperature",
        "standardise",
        "disagreement",
    )

    student: str = option(
        dataclasses.MISSING,
        "model to train: timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder",
    )
    teacher: str | None = option(
        None,
        "model to distil from: timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder; null for "
        "labels alone",
    )
    teacher_size: int | Literal["own"] | None = option(
        None,
        "side in pixels to which the student's images are resized for the teacher; own is the "
        "teacher's, null leaves them as they are",
        at_least=1,
    )
    teacher_head: Literal["own", "fit", "none"] = option(
        "own",
        "what makes classes of the teacher's features: its own classifier, a linear one fitted to "
        "the training images first, or none, where their relations alone teach",
    )
    teacher_store: str | None = option(
        None,
        "folder that keeps what the teacher answered on each of the views; auto is one for what "
        "decides it, under GLD_ZOO_CACHE or ~/.cache/gld_zoo; null asks it at every step",
        decides=False,
    )
    store_dtype: Literal["float16", "float32"] = option(
        "float16", "type of the numbers in teacher_store"
    )
    finetune: Literal["all", "classifier"] | None = option(
        None,
        "start from the student's pretrained weights, with a new classifier if the classes differ, "
        "and train all of it or the classifier alone; null starts from random weights",
    )
    student_args: dict[str, Any] = option(
        {}, "what else timm is to build the student with, such as '{drop_path_rate: 0.1}'"
    )
    grad_checkpointing: bool = option(
        False,
        "forget the student's inner maps and compute them again in the backward pass: less memory, "
        "more time, and batch norm's statistics move twice a step",
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
    test_fraction: float | Literal["auto"] = option(
        0.0,
        "share of the training images to measure on, class by class, where there is no such split; "
        "they are the same for every seed; auto is a fifth if no split is there to measure on",
    )
    image_column: str | None = option(
        None, "column of images; null takes the only one, or the usual name"
    )
    label_column: str | None = option(
        None, "column of classes, perhaps words; null takes the only one, or the usual name"
    )
    allow_empty_classes: bool = option(
        False, "train although a class has no training image, which is an error otherwise"
    )
    val_fraction: float = option(
        0.0,
        "share of the training images held out, class by class; they are measured each epoch and "
        "select best/, and the test split is measured at the end alone",
    )

    image_size: int | None = option(
        None, "side of the square images in pixels; null takes the student's", at_least=1
    )
    crop: Literal["padded", "resized"] = option(
        "padded",
        "random training crop: of the image with a border, or of a part of it, resized",
    )
    crop_padding: int = option(
        4, "black border in pixels round an image before its random crop; 0 for no crop", at_least=0
    )
    crop_scale: list[float] = option(
        [0.08, 1.0], "smallest and largest part of the area that a resized crop takes, 0 to 1"
    )
    crop_pct: float = option(
        1.0,
        "share of the resized image's side that the centre crop keeps when measuring, 0 to 1",
        at_least=0.01,
        at_most=1,
    )
    flip: bool | Literal["alternate"] = option(
        True, "mirror half of the training images; alternate mirrors each every other epoch"
    )
    augment: Literal["none", "trivial", "rand"] = option(
        "none", "torchvision's TrivialAugmentWide or RandAugment, an image at a time"
    )
    cutout: int = option(
        0,
        "side in pixels of a square in a random place that takes the mean colour; 0 for none",
        at_least=0,
    )
    erasing: float = option(
        0.0,
        "share of the images of which torchvision's RandomErasing takes a rectangle, 0 to 1",
        at_least=0,
        at_most=1,
    )
    mixup: float = option(
        0.0,
        "a of Beta(a, a), from which the share of each of two mixed images is drawn; 0 for none",
        at_least=0,
    )
    cutmix: float = option(
        0.0,
        "likewise for a rectangle of one image in another; with mixup, one of the two a step",
        at_least=0,
    )

    views: int | None = option(
        None,
        "epochs after which the augmentation of each image repeats, so that a teacher need not be "
        "asked again; null never repeats it",
        at_least=1,
    )
    augment_seed: int | None = option(
        None,
        "seed of the augmentation, stated where runs of several seeds share a teacher_store; null "
        "takes the run's",
        at_least=0,
    )

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
        at_least=0,
    )
    streaming: bool = option(False, "read the dataset in order from the hub, without a local copy")
    shuffle_buffer: int = option(
        10_000, "encoded images that a stream is shuffled over", at_least=1
    )
    train_images: int | None = option(
        None,
        "images of an epoch of a stream; null takes the number in the dataset's card",
        at_least=1,
    )

    grid: int | list[int] = option(
        2, "cells along each side of the feature map, the paper's d, or several such as '[2, 4]'"
    )
    alpha: float = option(
        0.7, "share of the global distillation against cross-entropy, 0 to 1", at_least=0, at_most=1
    )
    beta: float | Literal["auto"] = option(
        "auto",
        "weight of the relation; auto is the paper's 500, times batch_size (1 + cells) / 320",
    )
    local_weight: float = option(1.0, "weight of the local distillation", at_least=0)
    ce_weight: float | None = option(
        None, "weight of cross-entropy; null takes 1 - alpha", at_least=0
    )
    global_weight: float | None = option(
        None, "weight of the global distillation; null takes alpha", at_least=0
    )
    temperature: float = option(
        1.0, "divides the logits that are distilled", at_least=1e-3, at_most=1e3
    )
    standardise: bool = option(
        True, "divide the logits that are distilled by their standard deviation too"
    )
    disagreement: float = option(
        1.0,
        "weight of a cell where one alone of the teacher's answers, global or the cell's, is right",
        at_least=0,
    )
    label_smoothing: float = option(
        0.0,
        "share of each label that is spread over all classes in cross-entropy, 0 to 1",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming them."""
        super().__post_init__()
        if self.beta == "auto":
            object.__setattr__(self, "beta", self.scaled_beta)
        if not 0 <= self.relation_weight < math.inf:
            raise ValueError(f"beta={self.beta} must be auto, or finite and not negative")
        if self.disagreement != 1 and (self.label_smoothing or self.mixes):
            raise ValueError(
                "disagreement asks which answers are right, and mixup, cutmix and label_smoothing "
                "leave that open; leave it at 1 with them"
            )
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two parts of the area, the smaller first, "
                "between 0 and 1"
            )
        for name in ("val_fraction", "test_fraction"):
            value = getattr(self, name)
            if value != "auto" and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        if not self.streaming:
            self.refuse("is for streaming: true alone", "train_images", "shuffle_buffer")
        if self.crop == "padded":
            self.refuse("is for crop: resized alone", "crop_scale")
        else:
            self.refuse("is for crop: padded alone", "crop_padding")
        if self.streaming and self.flip == "alternate":
            raise ValueError(
                "flip=alternate needs the images' numbers, which a stream has not; set flip: true"
            )
        if self.streaming and (self.val_fraction or self.test_fraction or self.in_memory):
            raise ValueError(
                "streaming cannot be combined with val_fraction, test_fraction or in_memory"
            )

        self._check_views()
        if self.teaches_relations:
            names = ("alpha", "local_weight", "global_weight", "temperature", "standardise")
            self.refuse("has no effect with teacher_head: none", *names, "disagreement")

    def _check_views(self) -> None:
        """Refuse what is no function of an image and its view, where something rests on that."""
        for name in ("views", "augment_seed"):
            if self.streaming and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} needs the images' numbers, which a stream has not; use "
                    "streaming: false"
                )
        if self.streaming and self.teacher and self.teacher_head == "fit":
            raise ValueError(
                "teacher_head=fit reads the training images before they train, which a stream does "
                "not give; use streaming: false"
            )
        if self.views and self.views % 2 and self.flip == "alternate":
            raise ValueError(
                f"flip=alternate mirrors every other epoch, which views={self.views} would repeat "
                "out of turn; use an even number of views"
            )
        if not self.keeps_answers:
            return
        if self.views is None:
            raise ValueError(
                f"teacher_store={self.teacher_store} keeps what a teacher answers on views that "
                "come again; set views too, such as views: 4"
            )
        for name in ("mixup", "cutmix"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} makes images anew at each step, of which teacher_store="
                    f"{self.teacher_store} has nothing; leave one of them out"
                )

    @property
    def teaches_relations(self) -> bool:
        """Whether a teacher teaches by the relations of its features alone."""
        return bool(self.teacher) and self.teacher_head == "none"

    @property
    def teaches_by_gld(self) -> bool:
        """Whether a teacher teaches by all of GLD's terms, whatever their weights and the grid."""
        global_weight = self.alpha if self.global_weight is None else self.global_weight
        weights = (global_weight, self.local_weight, self.relation_weight)
        # what the logits are divided by, and how cells are weighed, is the method's own
        unchanged = self.standardise and self.temperature == self.disagreement == 1
        return bool(self.teacher) and all(weights) and unchanged and not self.teaches_relations

    @property
    def needs_labels(self) -> bool:
        """Whether there must be classes to learn."""
        return not self.teaches_relations

    @property
    def keeps_answers(self) -> bool:
        """Whether what the teacher answers is kept."""
        return bool(self.teacher and self.teacher_store)

    @property
    def scaled_beta(self) -> float:
        """The paper's weight of the relation, scaled to the rows of logits in a batch."""
        return PAPER_BETA * self.batch_size * (1 + count_cells(self.grid)) / PAPER_ROWS

    @property
    def relation_weight(self) -> float:
        """The number that beta is or, if it was left to be found, has become."""
        return float(self.beta)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    @property
    def subject(self) -> str:
        """The name of the model that is trained."""
        return self.student

    def deciding(self) -> list[str]:
        """Return the names of the options that decide the result."""
        return [*super().deciding(), *(["workers"] if self.streaming else [])]

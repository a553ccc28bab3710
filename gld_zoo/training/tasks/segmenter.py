"""Train DeepLabV3+ on images with masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torchmetrics.classification import MulticlassConfusionMatrix

from gld_zoo.downstream.saving import save_downstream
from gld_zoo.downstream.segmentation import create_deeplabv3plus
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.config.options import Schedule, another_default, option
from gld_zoo.training.data.batches import Data, EvalBatches, Normalize, Share
from gld_zoo.training.data.keyed import KeyedExamples, stack
from gld_zoo.training.data.segmentation_rows import (
    IGNORE,
    ListsToDevice,
    MeasuringTransform,
    SegmentationSource,
    collate_lists,
    training_transform,
)
from gld_zoo.training.engine.task import Terms
from gld_zoo.training.tasks.transfer import TransferRecipe, TransferTask


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(TransferRecipe):
    """Which segmenter learns what; the defaults are the paper's setting for VOC 2012 with SBD."""

    GROUPS: ClassVar[dict[str, str]] = dict(output_stride="masks", **TransferRecipe.GROUPS)

    output_stride: int = option(16, "of the backbone's deepest map, 16 or 8")
    mask_column: str = option("mask", "column of masks, whose values are classes; 255 is ignored")
    num_classes: int = option(
        21, "classes from 0, with the background where the data has one", at_least=2, at_most=255
    )
    label_names: list[str] = option([], "names of the classes in order; none numbers them")
    image_size: int = option(
        513,
        "side in pixels of the random training crops, and longer side of an image measured",
        at_least=1,
    )

    epochs: int = another_default("epochs", 50)
    batch_size: int = another_default("batch_size", 16)
    lr: float = another_default("lr", 0.007)
    schedule: Schedule = another_default("schedule", "poly")
    eval_batch_size: int = another_default("eval_batch_size", 8)

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming them."""
        super().__post_init__()
        if self.label_names and len(self.label_names) != self.num_classes:
            raise ValueError(
                f"label_names has {len(self.label_names)} names for num_classes={self.num_classes}"
            )

    @property
    def subject(self) -> str:
        """The name of the model that is trained."""
        return f"deeplabv3plus-{self.backbone}"


class Segmenter(TransferTask):
    """Trains DeepLabV3+; scores are the mean IoU over classes and the pixel accuracy, in %.

    Images are measured whole, and their logits resized to their own mask.

    Arguments and errors are the `Task`'s.
    """

    metric, metric_title = "miou", "mIoU"
    recipe: SegmentationRecipe

    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the images, the segmenter, and a module around it."""
        recipe = self.recipe
        if share.batch_size(recipe.batch_size) < 2:
            raise DataError(
                f"batch_size={recipe.batch_size} leaves a process one image, and batch norm of the "
                "image-level features needs two; use a larger one"
            )
        self.source = SegmentationSource(
            recipe.dataset,
            recipe.num_classes,
            config=recipe.dataset_config,
            revision=recipe.dataset_revision,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
            image_column=recipe.image_column,
            mask_column=recipe.mask_column,
        )
        checks = [rows.check() for rows in (self.source.train, self.source.test)]
        self.notes = [note for note in checks if note]
        model = self.create(create_deeplabv3plus, recipe.num_classes, recipe.output_stride)
        config = resolve_model_data_config(model.backbone)
        augmented = training_transform(recipe.image_size, config["mean"])
        data = self.read(
            share,
            ListsToDevice(Normalize(config["mean"], config["std"], self.accelerator.device)),
            train=KeyedExamples(self.source.train, augmented, recipe.seed),
            train_collate=stack,
            test=KeyedExamples(self.source.test, MeasuringTransform(recipe.image_size), 0),
            test_collate=collate_lists,
        )
        return data, model, nn.Sequential(model)

    def forward(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[Terms, Terms]:
        """Return the cross-entropy of the pixels that count."""
        loss = pixel_loss(self.network(images), masks)
        return dict(loss=loss, loss_ce=loss), {}

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return the mean loss of the images that count, the mean IoU, and the pixel accuracy.

        Raises:
            DataError: If the masks hold less than two classes, of which any model is right.
        """
        self.share_buffers(model)
        model.eval()
        device = self.accelerator.device
        # on Apple's GPUs it would need memory for pixels x classes squared
        counting = torch.device("cpu") if device.type == "mps" else device
        counts = MulticlassConfusionMatrix(self.recipe.num_classes, ignore_index=IGNORE)
        counts.to(counting)
        total, count = 0.0, 0
        images: Any
        masks: Any
        for images, masks in batches:
            for image, mask in zip(images, masks, strict=True):
                logits = F.interpolate(
                    model(image), size=mask.shape, mode="bilinear", align_corners=False
                )
                loss = pixel_loss(logits, mask[None])
                total, count = total + loss.item(), count + bool((mask != IGNORE).any())
                counts.update(logits.argmax(1).to(counting), mask[None].to(counting))
        sums = torch.tensor([total, count], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(device)).cpu()
        matrix = counts.compute().cpu().double()  # Apple's GPUs have no float64
        classes = (matrix.sum(1) > 0).nonzero().flatten().tolist()
        if len(classes) < 2:
            raise self.source.test.too_few(classes)
        return dict(
            loss=(sums[0] / sums[1].clamp_min(1)).item(),
            miou=100 * mean_iou(matrix),
            accuracy=100 * (matrix.trace() / matrix.sum().clamp_min(1)).item(),
        )

    def introduction(self) -> list[str]:
        """Return what to tell of the images, and of masks that seem to hold one class."""
        return [*super().introduction(), *self.notes]

    def describe_model(self) -> str:
        """Return the segmenter's name."""
        return f"DeepLabV3+ on {self.recipe.backbone}"

    def conclusion(self, summary: dict[str, Any], before: str, run: Path) -> list[str]:
        """Return what the run came to, and how to use the segmenter."""
        return [
            f"mIoU {before}, {summary['miou']:.2f} % after; pixel accuracy "
            f"{summary['accuracy']:.2f} %",
            self.how_to_use(run),
        ]

    def more_summary(self, run: Path) -> dict[str, Any]:
        """Return the dataset."""
        return dict(dataset=self.source.name)

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write a segmenter to a folder, as `load_downstream` loads it."""
        recipe = self.recipe
        names = recipe.label_names or [str(i) for i in range(recipe.num_classes)]
        save_downstream(model, folder, label_names=names, image_size=recipe.image_size)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the pixels that are not ignored; 0 if all are.

    Args:
        logits: `[B, K, H, W]`.
        masks: Class indices int64 `[B, H, W]`; 255 is ignored.
    """
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


def mean_iou(matrix: torch.Tensor) -> float:
    """Return the mean over classes of intersection over union; classes that never occur are out.

    Args:
        matrix: Pixels `[K, K]` of true class by predicted class.
    """
    found = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - found
    return (found[union > 0] / union[union > 0]).mean().item() if union.any() else 0.0

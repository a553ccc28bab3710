"""Train SSD300 on images with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import faster_coco_eval  # noqa: F401  what torchmetrics counts by, so that it is missed at once
import torch
import torch.nn as nn
from accelerate.utils import gather_object
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from gld_zoo.downstream.detection import SIZE, create_ssd300
from gld_zoo.downstream.saving import save_downstream
from gld_zoo.training.build.refusals import check_lone_image
from gld_zoo.training.config.options import another_default, option
from gld_zoo.training.data.batches import Data, EvalBatches, Share
from gld_zoo.training.data.detection_rows import (
    BoxesToDevice,
    DetectionSource,
    Format,
    collate,
    measuring_transform,
    training_transform,
)
from gld_zoo.training.data.keyed import KeyedExamples
from gld_zoo.training.engine.task import Terms
from gld_zoo.training.tasks.transfer import TransferRecipe, TransferTask

Images = list[torch.Tensor]
Targets = list[dict[str, torch.Tensor]]
VOC07_RECALLS = [step / 10 for step in range(11)]


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(TransferRecipe):
    """Which detector learns what; the defaults are the paper's setting."""

    GROUPS: ClassVar[dict[str, str]] = dict(objects_column="boxes", **TransferRecipe.GROUPS)

    objects_column: str = option("objects", "column of boxes and categories")
    bbox_format: Format = option(
        "xyxy", "corners, or xywh for the upper left corner, width and height, as COCO has it"
    )
    augment: bool = option(True, "SSD's random colours, zoom, crop and flip; false resizes alone")

    epochs: int = another_default("epochs", 250)
    batch_size: int = another_default("batch_size", 32)
    lr: float = another_default("lr", 0.001)
    lr_drops: list[float] = another_default("lr_drops", [0.6, 0.8])
    warmup_epochs: float = another_default("warmup_epochs", 2.0)
    eval_batch_size: int = another_default("eval_batch_size", 32)

    @property
    def subject(self) -> str:
        """The name of the model that is trained."""
        return f"ssd300-{self.backbone}"


class Detector(TransferTask):
    """Trains SSD300; scores are COCO's AP and AP50 and an AP in the manner of VOC 2007, in %.

    The last is the mean precision at 11 recalls and an IoU of 0.5 by COCO's matching, and differs
    from VOC's own in two ways. A detection takes the free object of the largest IoU, where VOC
    takes the largest IoU of all and counts a second detection of it as false. And a difficult
    object, as COCO's crowds, excuses a detection that lies in it by half of the detection's own
    area, where VOC asks for an IoU of 0.5.

    Arguments and errors are the `Task`'s.
    """

    metric, metric_title = "ap50", "AP50"
    recipe: DetectionRecipe
    model: SSD

    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the images, the detector, and its loss as a module."""
        recipe = self.recipe
        self.source = DetectionSource(
            recipe.dataset,
            config=recipe.dataset_config,
            revision=recipe.dataset_revision,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
            image_column=recipe.image_column,
            objects_column=recipe.objects_column,
            bbox_format=recipe.bbox_format,
        )
        self.boxes = [rows.check() for rows in (self.source.train, self.source.test)]
        model = self.create(create_ssd300, len(self.source.label_names) + 1)
        self._check_batch(model, share)
        plain = measuring_transform()
        augmented = training_transform(SIZE, model.transform.image_mean)
        data = self.read(
            share,
            BoxesToDevice(self.accelerator.device),
            train=KeyedExamples(
                self.source.train, augmented if recipe.augment else plain, recipe.seed
            ),
            train_collate=collate,
            test=KeyedExamples(self.source.test, plain, 0),
            test_collate=collate,
        )
        return data, model, SSDLoss(model)

    def _check_batch(self, model: SSD, share: Share) -> None:
        """Refuse a batch of which a process gets one image that the backbone cannot train on."""
        recipe, processes = self.recipe, share.world_size
        if share.batch_size(recipe.batch_size) > 1 or (recipe.sync_batch_norm and processes > 1):
            return
        check_lone_image(
            model.backbone,
            torch.zeros(1, 3, SIZE, SIZE, device=self.accelerator.device),
            name=f"backbone {recipe.backbone!r}",
            batch_size=recipe.batch_size,
            processes=processes,
        )

    def forward(self, images: Images, targets: Targets) -> tuple[Terms, Terms]:
        """Return the sum of SSD's two losses, and both."""
        losses = self.network(images, targets)
        box, category = losses["bbox_regression"], losses["classification"]
        return dict(loss=box + category, loss_box=box, loss_class=category), {}

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return the mean loss of an image, and each AP."""
        self.share_buffers(model)
        model.eval()
        seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]] = []
        images: Any
        targets: Any
        for images, targets in batches:
            losses, found = losses_and_detections(model, images, targets)
            seen += zip(map(_on_cpu, found), map(_on_cpu, targets), losses.tolist(), strict=True)
        # torchmetrics' own gathering wants as many images of every process
        if self.accelerator.num_processes > 1:
            seen = gather_object(seen)
        guesses, truths, each = zip(*seen, strict=True)
        coco = average_precision(guesses, truths)
        voc = average_precision(guesses, truths, iou_thresholds=[0.5], rec_thresholds=VOC07_RECALLS)
        # torchmetrics gives -1 where no object is to be found
        return dict(
            loss=sum(each) / len(each),
            ap=100 * max(coco["map"].item(), 0.0),
            ap50=100 * max(coco["map_50"].item(), 0.0),
            voc07=100 * max(voc["map"].item(), 0.0),
        )

    def introduction(self) -> list[str]:
        """Return what to tell of the images and their boxes."""
        (line,) = super().introduction()
        classes = len(self.source.label_names)
        train, test = self.boxes
        return [f"{line}, {train:,} and {test:,} boxes of {classes} classes"]

    def describe_model(self) -> str:
        """Return the detector's name."""
        return f"SSD300 on {self.recipe.backbone}"

    def conclusion(self, summary: dict[str, Any], before: str, run: Path) -> list[str]:
        """Return what the run came to, and how to use the detector."""
        return [
            f"AP50 {before}, {summary['ap50']:.2f} % after; AP "
            f"{summary['ap']:.2f} %, VOC07-style {summary['voc07']:.2f} %",
            self.how_to_use(run),
        ]

    def made_of(self) -> dict[str, Any]:
        """Return the counts of images and of boxes."""
        return dict(super().made_of(), train_boxes=self.boxes[0], test_boxes=self.boxes[1])

    def more_summary(self, run: Path) -> dict[str, Any]:
        """Return the dataset and its boxes."""
        return dict(dataset=self.source.name, train_boxes=self.boxes[0], test_boxes=self.boxes[1])

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write a detector to a folder, as `load_downstream` loads it."""
        save_downstream(model, folder, label_names=self.source.label_names)


def average_precision(
    guesses: Sequence[dict[str, torch.Tensor]],
    truths: Sequence[dict[str, torch.Tensor]],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Return COCO's precisions of some images' detections, on the CPU.

    Args:
        guesses: `boxes`, `labels` and `scores` of each image.
        truths: `boxes` and `labels`, and `iscrowd` for what is ignored.
        **options: As for torchmetrics' `MeanAveragePrecision`.
    """
    metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False, **options)
    metric.warn_on_many_detections = False  # only the best hundred count, as COCO has it
    metric.update(list(guesses), list(truths))
    return metric.compute()


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # copies, since a tensor from a worker holds a file open for as long as it lives
    return {key: value.to("cpu", copy=True) for key, value in tensors.items()}


class SSDLoss(nn.Module):
    """SSD's two losses of a batch; boxes and losses in float32 under autocast.

    Args:
        model: From `create_ssd300`.
    """

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Images, targets: Targets) -> dict[str, torch.Tensor]:
        """Return `bbox_regression` and `classification`."""
        batch = _Batch(self.model, images, targets)
        return batch.losses()


@torch.no_grad()
def losses_and_detections(
    model: SSD, images: Images, targets: Targets
) -> tuple[torch.Tensor, Targets]:
    """Return each image's loss `[B]` and detections, of one forward pass of a model in eval mode.

    The losses are image by image, so that they do not depend on which images share a batch.
    """
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    batch = _Batch(model, images, targets)
    each = [batch.losses(slice(i, i + 1)) for i in range(len(images))]
    losses = torch.stack([one["bbox_regression"] + one["classification"] for one in each])
    found = model.postprocess_detections(batch.dense, batch.boxes, batch.sizes)
    return losses, model.transform.postprocess(found, batch.sizes, sizes)


class _Batch:
    """What `SSD.forward` computes on its way, where training and measuring need different ends."""

    def __init__(self, model: SSD, images: Images, targets: Targets) -> None:
        self.model = model
        listed, self.targets = model.transform(images, targets)
        maps = list(model.backbone(listed.tensors).values())
        self.dense = {key: value.float() for key, value in model.head(maps).items()}
        # in the maps' bfloat16 the default boxes would be off by up to a pixel
        self.boxes = model.anchor_generator(listed, [one.float() for one in maps])
        self.sizes = listed.image_sizes

    def losses(self, part: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Return the losses of some images."""
        targets, boxes = self.targets[part], self.boxes[part]
        matched = [
            self._match(target["boxes"], own) for target, own in zip(targets, boxes, strict=True)
        ]
        dense = {key: value[part] for key, value in self.dense.items()}
        with torch.autocast(boxes[0].device.type, enabled=False):
            return self.model.compute_loss(targets, dense, boxes, matched)

    def _match(self, objects: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        if not len(objects):
            return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
        return self.model.proposal_matcher(box_iou(objects, boxes))

"""What a classifier scores on a dataset's test split, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from gld_zoo import global_local_logits
from gld_zoo.distillation.teacher import Teacher, side_of, take_size
from gld_zoo.training.build.class_names import match_classes
from gld_zoo.training.build.create import create_frozen
from gld_zoo.training.build.refusals import refusals
from gld_zoo.training.common.disk import replacing
from gld_zoo.training.data.batches import EvalBatches
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.confusion import draw_confusion
from gld_zoo.training.measure.inputs import Measured, build_measured, measuring_batches
from gld_zoo.training.measure.scores import Scores, collect


def evaluate(
    name: str,
    source: ImageSource,
    *,
    teacher: str | None = None,
    teacher_size: int | Literal["own"] | None = None,
    grid: int = 2,
    image_size: int | None = None,
    batch_size: int = 250,
    workers: int = 0,
    mirror: bool = False,
    picture: Path | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure a model on a dataset's test split.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.
        source: The dataset.
        teacher: Such a name too, to compare with; it sees the same pixels in its own scale.
        teacher_size: Side in pixels to resize them to for it, or 'own'; None: as they are.
        grid: Cells along each side of the feature map; 0 leaves the local rows out.
        image_size: Side in pixels; None takes the model's.
        batch_size: Images a forward pass.
        workers: Processes that read images; 0 decodes them once into memory where they fit.
        mirror: Average the model's logits over each image and its mirror image.
        picture: PNG to draw the confusion of classes to.
        device: Where to run.

    Raises:
        DataError: If the dataset does not fit.
        DiskError: If the picture cannot be written.
        ModelError: If a model does not.
    """
    labels = source.label_names
    measured = build_measured(name, device, image_size=image_size, label_names=labels)
    reference = _reference(teacher, teacher_size, measured, labels, device) if teacher else None
    missing = missing_local_rows(measured.model, measured.size, grid, device)
    batches = measuring_batches(source.test, measured, device, batch_size, workers)
    scores = collect(measured.model, batches, 0 if missing else grid, mirror=mirror)
    _draw(scores, labels, picture)
    result = dict(model=name, dataset=source.name, **of_scores(scores, measured, device))
    by_class = dict(zip(labels, scores.top1_by_class(), strict=True))
    result.update(mirror=mirror, class_top1=by_class)
    if grid:
        result.update(local_top1=missing or scores.local_top1())
    if reference:
        shown = dict(teacher=teacher, teacher_image_size=reference.size)
        result.update(shown, **_compared(scores, reference, batches))
    return result


def _draw(scores: Scores, label_names: list[str], picture: Path | None) -> None:
    if picture:
        with replacing(picture) as temporary:
            draw_confusion(scores.confusion(), label_names, temporary)


def _reference(
    name: str,
    size: int | Literal["own"] | None,
    measured: Measured,
    label_names: list[str],
    device: torch.device,
) -> Teacher:
    """Return a model to compare with, which is given the images of the one measured.

    It is built before they are read, so that its mistakes cost nothing.
    """
    model, title = create_frozen(name, device, role="teacher"), f"teacher {name!r}"
    columns = match_classes(model, label_names, title, remedy="use one trained on this dataset")
    shown = side_of(model, size) or measured.size
    take_size(model, shown)
    with refusals(title, shown, "choose another, or another teacher_size (own is its own)"):
        model(torch.zeros(1, 3, shown, shown, device=device))
    mean, std = measured.config["mean"], measured.config["std"]
    return Teacher(model, None, mean, std, size=shown, columns=columns)


def of_scores(scores: Scores, measured: Measured, device: torch.device) -> dict[str, Any]:
    """Return accuracy in %, calibration, size and speed of a model."""
    model, size = measured.model, measured.size
    return dict(
        images=len(scores.target),
        image_size=size,
        top1=scores.top(1),
        top5=scores.top(5),
        calibration_error=scores.calibration_error(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        macs=count_macs(model, size, device),
        images_per_second=len(scores.target) / scores.seconds,
    )


def _compared(scores: Scores, reference: Teacher, batches: EvalBatches) -> dict[str, float]:
    """Return another model's top-1 on the same images, and how often both agree, in %."""
    guesses = collect(reference.classify, batches, 0)
    return dict(teacher_top1=guesses.top(1), agreement=scores.agreement(guesses))


@torch.no_grad()
def missing_local_rows(model: Any, size: int, grid: int, device: torch.device) -> str | None:
    """Return why a model has no local rows; None if it has, or if `grid` is 0."""
    if not grid:
        return None
    try:
        global_local_logits(model, torch.zeros(1, 3, size, size, device=device), grid)
    except ValueError as error:
        return f"none: {error}"
    return None


@torch.no_grad()
def count_macs(model: Any, size: int, device: torch.device) -> int:
    """Return the multiplications of an image's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() // 2

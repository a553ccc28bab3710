"""A linear classifier on the frozen features of a model."""

from __future__ import annotations

from typing import Any

import torch

from gld_zoo.training.build.fitted_head import (
    HELD_OUT,
    Features,
    check_features_fit,
    choose_penalty,
    fit_classifier,
    top1_of,
)
from gld_zoo.training.data.batches import EvalBatches
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.inputs import build_measured, measuring_batches


def linear_probe(
    name: str,
    source: ImageSource,
    *,
    image_size: int | None = None,
    mirror: bool = True,
    batch_size: int = 250,
    workers: int = 0,
    seed: int = 0,
    device: torch.device,
) -> dict[str, Any]:
    """Fit a linear classifier to a frozen model's features and measure it on the test split.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder, of any classes.
        source: The dataset.
        image_size: Side in pixels; None takes the model's.
        mirror: Train on the mirror image of each image too.
        batch_size: Images a forward pass.
        workers: Processes that read images; 0 decodes them once into memory where they fit.
        seed: Of the images held out.
        device: Where to run.

    Raises:
        DataError: If the dataset does not fit.
        ModelError: If the model does not.
    """
    measured = build_measured(name, device, image_size=image_size)
    remedy = "use fewer images" + (" or --mirror false" if mirror else "")
    width, views = measured.model.head_hidden_size, 2 if mirror else 1
    check_features_fit(width, len(source.train), views=views, remedy=remedy)

    def extract(rows: Rows, *, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        batches = measuring_batches(rows, measured, device, batch_size=batch_size, workers=workers)
        return pooled_features(measured.model, batches, mirrored=mirrored)

    parts = source.train.hold_out(HELD_OUT, seed)
    kept, held = (extract(rows, mirrored=mirror) for rows in parts)
    test = extract(source.test)
    return dict(
        model=name,
        dataset=source.name,
        train_images=len(kept[1]) + len(held[1]),
        test_images=len(test[1]),
        image_size=measured.size,
        features=kept[0].shape[-1],
        **fit_and_score(kept, held, test, len(source.label_names)),
    )


def fit_and_score(kept: Features, held: Features, test: Features, classes: int) -> dict[str, float]:
    """Return the penalty that is best on images held out, and the top-1 in % of all with it."""
    penalty = choose_penalty(kept, (held[0][:, :1], held[1]), classes)
    features, target = (torch.cat(parts) for parts in zip(kept, held, strict=True))
    classifier = fit_classifier(features, target, classes, penalty)
    return dict(
        penalty=penalty,
        train_top1=top1_of(classifier, features[:, :1], target),
        top1=top1_of(classifier, *test),
    )


@torch.no_grad()
def pooled_features(
    model: Any, batches: EvalBatches, *, mirrored: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled features `[N, V, D]` of a split, V = 2 views if mirrored, and classes `[N]`."""
    features, targets = [], []
    for images, target in batches:
        views = [images, images.flip(3)] if mirrored else [images]
        pooled = [model.forward_head(model.forward_features(v), pre_logits=True) for v in views]
        features.append(torch.stack(pooled, dim=1))
        targets.append(target)
    return torch.cat(features), torch.cat(targets)

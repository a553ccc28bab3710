"""A linear classifier fitted to the frozen features of a model, to its optimum."""

from __future__ import annotations

from typing import Any, cast

import psutil
import torch
import torch.nn.functional as F

from gld_zoo.distillation.teacher import LinearHead
from gld_zoo.training.common.errors import DataError

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
WORSE = 2  # penalties in a row, after which smaller ones are not tried
HELD_OUT = 0.1  # of the training images, to choose the penalty

Features = tuple[torch.Tensor, torch.Tensor]  # `[N, V, D]` of V views of each image; classes `[N]`


def check_features_fit(width: int, images: int, *, views: int, remedy: str) -> None:
    """Refuse features of more images than this machine has memory for.

    Args:
        width: D.
        images: N.
        views: V of each image.
        remedy: What the error advises.

    Raises:
        DataError: If they would not fit: as computed, standardised, and joined from two parts.
    """
    needed = images * views * width * (4 + 4 + 8 + 8)
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"the features of {images:,} images take {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free; {remedy}"
        )


def choose_penalty(kept: Features, held: Features, classes: int) -> float:
    """Return the penalty whose classifier is best on images held out; of equals the largest.

    Each fit begins where that of the larger penalty before it ended, in float32, and the smaller
    ones are not tried once two in a row were worse.

    Args:
        kept: Features `[N, V, D]` and classes `[N]` to fit to.
        held: Those held out, as they are and not mirrored: `[M, 1, D]` and `[M]`.
        classes: K.
    """
    best, best_top1, worse, classifier = PENALTIES[0], -1.0, 0, None
    for penalty in PENALTIES:
        classifier = fit_classifier(*kept, classes, penalty, dtype=torch.float32, start=classifier)
        top1 = top1_of(classifier, *held)
        if top1 > best_top1:
            best, best_top1, worse = penalty, top1, 0
        elif (worse := worse + 1) == WORSE:
            break
    return best


def fit_classifier(
    features: torch.Tensor,
    target: torch.Tensor,
    classes: int,
    penalty: float,
    *,
    dtype: torch.dtype = torch.float64,
    start: LinearHead | None = None,
) -> LinearHead:
    """Fit multinomial logistic regression: mean cross-entropy + penalty / 2 · |weight|².

    Args:
        features: `[N, V, D]`, V views of each image.
        target: Classes `[N]`.
        classes: K.
        penalty: On the weights of standardised features, not on the bias.
        dtype: To compute in.
        start: A head fitted to the same features, to begin at; None begins at zero.
    """
    target = target.repeat_interleave(features.shape[1])
    rows = features.flatten(0, 1)
    mean, std = rows.double().mean(0), rows.double().std(0)
    # a feature that never changes says nothing: leave it at 0 instead of dividing by it
    std = torch.where(std > 0, std, 1)
    mean, std = mean.to(dtype), std.to(dtype)
    weight, bias = mean.new_zeros(classes, len(mean)), mean.new_zeros(classes)
    if start is not None:
        weight, bias = (part.to(dtype, copy=True) for part in (start.weight, start.bias))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    standardised = (rows.to(dtype) - mean) / std
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standardised, weight, bias), target)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cast(Any, closure))
    return LinearHead(mean, std, weight.detach(), bias.detach())


@torch.no_grad()
def top1_of(head: LinearHead, features: torch.Tensor, target: torch.Tensor) -> float:
    """Return the top-1 in % on features `[N, 1, D]`."""
    guess = head(features[:, 0]).argmax(1)
    return 100 * (guess == target).double().mean().item()

"""What a classifier's labels are asked: which classes have images, and how often it is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.columns import listed
from gld_zoo.training.data.sources import ImageSource


def check_classes(source: ImageSource, *, allowed: bool) -> list[str]:
    """Return the classes without a training image.

    Raises:
        DataError: If there are some and they are not allowed.
    """
    counts = source.train.counts()
    empty = [name for name, count in zip(source.label_names, counts, strict=True) if not count]
    if empty and not allowed:
        raise DataError(
            f"{source.train.where} has no image of {len(empty)} of its {len(counts)} classes "
            f"({listed(empty)}); add some, remove the classes, or set allow_empty_classes: true"
        )
    return empty


def smooth(target: torch.Tensor, classes: int, share: float) -> torch.Tensor:
    """Return probabilities `[B, K]` of classes `[B]` or probabilities, a share of them spread."""
    if target.ndim == 1:
        target = F.one_hot(target, classes).float()
    return target * (1 - share) + share / classes


@torch.no_grad()
def accuracy(logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a batch's `train_top1` and `train_top5` in % of logits `[B, K]`.

    Of a mixed label `[B, K]` the likeliest class counts.
    """
    if target.ndim == 2:
        target = target.argmax(1)
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    share = 100 / len(target)
    return dict(train_top1=hits[:, 0].sum() * share, train_top5=hits.sum() * share)

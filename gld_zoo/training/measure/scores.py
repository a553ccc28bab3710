"""A model's logits on a split, and what is counted from them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from gld_zoo import global_local_logits

BINS = 15  # of equal width, for the calibration error


@dataclass(frozen=True)
class Scores:
    """A model's logits on a split: global and local `[N, 1+L, K]`, and the classes `[N]`."""

    logits: torch.Tensor
    target: torch.Tensor
    seconds: float

    def top(self, k: int, row: int = 0) -> float:
        """Return the share of images, in %, whose class is among a row's k largest logits."""
        logits = self.logits[:, row]
        hits = logits.topk(min(k, logits.shape[1])).indices == self.target[:, None]
        return 100 * hits.any(1).double().mean().item()

    def local_top1(self) -> list[float]:
        """Return the top-1 of each cell in %."""
        return [self.top(1, row) for row in range(1, self.logits.shape[1])]

    def confusion(self) -> torch.Tensor:
        """Return the images int64 `[K, K]` of each class (rows) by the class given (columns)."""
        classes = self.logits.shape[-1]
        pairs = self.target * classes + self.logits[:, 0].argmax(1)
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def top1_by_class(self) -> list[float | None]:
        """Return the top-1 of each class's images in %; None for a class without any."""
        matrix = self.confusion()
        pairs = zip(matrix.diagonal().tolist(), matrix.sum(1).tolist(), strict=True)
        return [100 * right / count if count else None for right, count in pairs]

    def calibration_error(self) -> float:
        """Return the expected calibration error in %: of 15 bins of confidence, equal in width.

        Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
        """
        confidence, guess = self.logits[:, 0].double().softmax(1).max(1)
        correct = (guess == self.target).double()
        bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
        return 100 * gaps.abs().sum().item() / len(self.target)

    def agreement(self, other: Scores) -> float:
        """Return the share of images, in %, that both models give the same class."""
        same = self.logits[:, 0].argmax(1) == other.logits[:, 0].argmax(1)
        return 100 * same.double().mean().item()


@torch.no_grad()
def collect(model: Any, batches: Any, grid: int, *, mirror: bool = False) -> Scores:
    """Run a model over a split; the clock counts its forward pass alone.

    Args:
        model: Maps images to logits `[B, K]`, and for a grid is one of timm's.
        batches: The split.
        grid: Cells along each side of the feature map; 0 for the global row alone.
        mirror: Average the global logits over each image and its mirror image; the local ones are
            the image's own.
    """
    logits: list[torch.Tensor] = []
    targets, seconds = [], 0.0
    for images, target in batches:
        if not logits:
            model(images)  # what a first pass sets up is not the model's speed
        _wait(images.device)
        began = time.perf_counter()
        output = model(images)
        if mirror:
            output = (output + model(images.flip(3))) / 2
        _wait(images.device)
        seconds += time.perf_counter() - began
        rows = output[:, None]
        if grid:
            rows = torch.cat([rows, global_local_logits(model, images, grid)[:, 1:]], dim=1)
        logits.append(rows.cpu())
        targets.append(target.cpu())
    return Scores(torch.cat(logits), torch.cat(targets), seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

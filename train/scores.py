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
def predict(model: Any, batches: Any, grid: int) -> Scores:
    """Run a model over a split; the clock counts its forward pass alone."""
    logits: list[torch.Tensor] = []
    targets, seconds = [], 0.0
    for images, target in batches:
        if not logits:
            model(images)  # what a first pass sets up is not the model's speed
        _wait(images.device)
        began = time.perf_counter()
        output = model(images)
        _wait(images.device)
        seconds += time.perf_counter() - began
        rows = global_local_logits(model, images, grid) if grid else output[:, None]
        logits.append(rows.cpu())
        targets.append(target.cpu())
    return Scores(torch.cat(logits), torch.cat(targets), seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Mixup and CutMix of whole batches, the same whatever the number of processes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import Batch, Share, TrainBatches, derive_seed


class MixedBatches:
    """Batches whose images are mixed in pairs; labels become probabilities `[B, K]`.

    Image i of the global batch of B is mixed with image (i + B/2) mod B, of which a process that
    takes rows r::W holds both. The share is drawn from (seed, epoch, step) for the whole batch.

    Args:
        batches: To mix.
        classes: K.
        mixup: a of Beta(a, a), from which the share of an image's own pixels is drawn; 0 for none.
        cutmix: Likewise for the share of its own area; with mixup, a step has one or the other.
        batch_size: B, over all processes.
        seed: The recipe's seed.
        share: This process's part.

    Raises:
        DataError: If a process's part of a batch has no halves.

    Sources: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """

    def __init__(
        self,
        batches: TrainBatches,
        *,
        classes: int,
        mixup: float,
        cutmix: float,
        batch_size: int,
        seed: int,
        share: Share,
    ) -> None:
        if batch_size % (2 * share.world_size):
            raise DataError(
                f"batch_size={batch_size} cannot be mixed in pairs within each process "
                f"({share.world_size} in all); use a multiple of twice their number"
            )
        self.batches = batches
        self.count = batches.count
        self.classes = classes
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield mixed images `[B, 3, S, S]` and probabilities `[B, K]` of one epoch."""
        for step, (images, target) in enumerate(self.batches.epoch(epoch, start), start):
            draw = random.Random(derive_seed(self.seed, epoch, step, -1))
            whole = self.mixup and not (self.cutmix and draw.random() < 0.5)
            if whole:
                own = draw.betavariate(self.mixup, self.mixup)
                images = mix(images, own)
            else:
                own = draw.betavariate(self.cutmix, self.cutmix)
                images, own = cut_and_mix(images, own, draw)
            labels = F.one_hot(target, self.classes).to(images.dtype)
            yield images, mix(labels, own)


def mix(values: torch.Tensor, own: float) -> torch.Tensor:
    """Mix the halves of `[B, ...]` row by row: `own` of each, the rest of the other's."""
    first, second = values.chunk(2)
    return torch.cat([first * own + second * (1 - own), second * own + first * (1 - own)])


def cut_and_mix(
    images: torch.Tensor, own: float, draw: random.Random
) -> tuple[torch.Tensor, float]:
    """Put a rectangle of the other half's image in each; return the share of the own area, too.

    Args:
        images: `[B, C, H, W]`.
        own: Share that is to stay, before the rectangle is cut at the border.
        draw: Where the rectangle's centre comes from.
    """
    height, width = images.shape[2:]
    side = (1 - own) ** 0.5
    rows = _span(height, side, draw)
    columns = _span(width, side, draw)
    first, second = images.chunk(2)
    mixed = torch.cat([first, second])
    half = len(first)
    mixed[:half, :, rows, columns] = second[:, :, rows, columns]
    mixed[half:, :, rows, columns] = first[:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _span(length: int, share: float, draw: random.Random) -> slice:
    """Return a share of a length round a place that is drawn, cut at both ends."""
    centre, half = draw.randrange(length), int(length * share) // 2
    return slice(max(0, centre - half), min(length, centre + half))

"""Small sets: decoded once to a uint8 tensor, then cropped, flipped and normalised as batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torchvision.transforms import v2

from gld_zoo.training.data.batches import (
    Batch,
    Drawing,
    Normalize,
    Share,
    check_fills_a_batch,
    cut_out,
    epoch_generator,
    mirrored_first,
)
from gld_zoo.training.data.rows import Rows

CHUNK = 1024  # encoded images in memory while decoding


@dataclass(frozen=True)
class Split:
    """Decoded images uint8 `[N, S, S, 3]`, perhaps with a border, and their classes int64 `[N]`."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Split:
        """Move both tensors."""
        return Split(self.images.to(device), self.labels.to(device))


def decode(rows: Rows, transform: v2.Transform, size: int, padding: int = 0) -> Split:
    """Decode a split whole, each image with a black border of `padding` pixels.

    Args:
        rows: The split.
        transform: Maps an image to uint8 `[3, size, size]`.
        size: Side in pixels.
        padding: Width of the border in pixels.

    Raises:
        DataError: If an image cannot be read or a label is outside the classes.
    """
    labels = rows.labels()
    side = size + 2 * padding
    images = torch.zeros((len(rows), side, side, 3), dtype=torch.uint8)
    inner = images[:, padding : padding + size, padding : padding + size]

    def put(row: int, item: dict[str, Any]) -> None:
        inner[row] = transform(rows.read(item, rows.place(row))).permute(1, 2, 0)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(rows), CHUNK):  # else all encoded images would wait in memory
            part = rows.table[start : start + CHUNK][rows.image_column]
            for _ in pool.map(put, range(start, len(rows)), part):
                pass
    return Split(images, labels)


class _Drawn(NamedTuple):
    """The top left corners of all crops `[2, N]`, who is mirrored `[N]`, the holes' centres."""

    corners: torch.Tensor
    flips: torch.Tensor
    holes: torch.Tensor


class MemoryBatches:
    """Augmented, normalised batches of a decoded split.

    The epoch's order is a permutation drawn from (seed, epoch); crop, flip and cutout of image i
    are the i-th draw from (seed, epoch), or of a view from (seed, view). Process r takes rows r::W
    of each global batch; the last, incomplete one is dropped.

    Args:
        split: Decoded images, with a border for the random crop.
        normalize: From pixels to floats, on the device that trains, where the images are kept.
        batch_size: Images a step over all processes.
        crop_padding: Width of that border in pixels.
        flip: Mirror half of the images, or 'alternate' for each image every other epoch.
        cutout: Side in pixels of a square in the mean colour; 0 for none.
        drawing: What the order and the augmentation are drawn from.
        share: This process's part.

    Raises:
        DataError: If the split is smaller than a batch.
    """

    def __init__(
        self,
        split: Split,
        normalize: Normalize,
        *,
        batch_size: int,
        crop_padding: int,
        flip: bool | str,
        drawing: Drawing,
        share: Share,
        cutout: int = 0,
    ) -> None:
        self.count = len(split.labels)
        check_fills_a_batch(self.count, batch_size)
        self.labels = split.labels.to(normalize.device)
        self.size = split.images.shape[1] - 2 * crop_padding
        self.images = split.images.to(normalize.device)
        self.normalize = normalize
        self.batch_size = batch_size
        self.crop_padding = crop_padding
        self.flip = flip
        self.cutout = cutout
        self.drawing = drawing
        self.share = share
        if flip == "alternate":
            seed = drawing.of_images
            self.first = torch.tensor([mirrored_first(seed, row) for row in range(self.count)])

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.count // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` in channels-last layout and labels `[B]` of one epoch."""
        drawn = self._draw(self.drawing.view(epoch))
        for rows in self.rows(epoch, start):
            here = rows.to(self.images.device)
            yield self._images(here, drawn), self.labels[here]

    def rows(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows of each batch that `epoch` yields."""
        order = self.drawing.order(epoch, self.count)
        batches = order[: len(self) * self.batch_size].split(self.batch_size)
        yield from map(self.share.of, batches[start:])

    def of_view(
        self, view: int, rows: torch.Tensor, step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows, `step` at a time, and their images as they are augmented in a view."""
        drawn = self._draw(view)
        for part in rows.cpu().split(step):
            yield part, self._images(part.to(self.images.device), drawn)

    def _draw(self, view: int) -> _Drawn:
        """Draw how each image of the split is cropped, mirrored and cut out of in a view."""
        device = self.images.device
        generator = epoch_generator(self.drawing.of_images, view)
        torch.randperm(self.count, generator=generator)  # the first draw is the order's
        shape = (2, self.count)
        corners = torch.randint(2 * self.crop_padding + 1, shape, generator=generator)
        flips = torch.rand(self.count, generator=generator) < 0.5
        if self.flip == "alternate":
            flips = self.first ^ bool(view % 2)
        holes = torch.randint(self.size, shape, generator=generator)
        return _Drawn(corners.to(device), flips.to(device) & bool(self.flip), holes.to(device))

    def _images(self, rows: torch.Tensor, drawn: _Drawn) -> torch.Tensor:
        pixels = self.crop(rows, drawn.corners[0], drawn.corners[1], drawn.flips)
        if self.cutout:
            lines, columns = drawn.holes[:, rows]
            pixels = cut_out(pixels, lines, columns, self.cutout, self.normalize.mean_pixel)
        return self.normalize(pixels)

    def crop(
        self, rows: torch.Tensor, tops: torch.Tensor, lefts: torch.Tensor, flips: torch.Tensor
    ) -> torch.Tensor:
        """Return the crops `[B, S, S, 3]` of some rows, mirrored where `flips` says so."""
        offsets = torch.arange(self.size, device=rows.device)
        lines = tops[rows, None] + offsets
        mirrored = torch.where(flips[rows, None], self.size - 1 - offsets, offsets)
        columns = mirrored + lefts[rows, None]
        return self.images[rows[:, None, None], lines[:, :, None], columns[:, None, :]]


class MemoryEval:
    """A process's share of a decoded split, normalised, in order; nothing is dropped or padded.

    Args:
        split: Decoded images, on the device that measures.
        normalize: From pixels to floats.
        batch_size: Images a step over all processes.
        share: This process's part.
    """

    def __init__(
        self, split: Split, normalize: Normalize, *, batch_size: int, share: Share
    ) -> None:
        self.count = len(split.labels)
        self.images, self.labels = share.of(split.images), share.of(split.labels)
        self.normalize = normalize
        self.step = max(1, batch_size // share.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` and labels `[B]`."""
        parts = zip(self.images.split(self.step), self.labels.split(self.step), strict=True)
        for pixels, target in parts:
            yield self.normalize(pixels), target

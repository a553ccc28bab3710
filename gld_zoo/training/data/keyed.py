"""Examples read and transformed as they are needed, by a DataLoader's workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.common.signals import end_workers_at_exit, ignore_signals
from gld_zoo.training.data.batches import (
    Drawing,
    Normalize,
    Share,
    check_fills_a_batch,
    derive_seed,
    mirrored_first,
)

Key = tuple[int, int]  # view, which is the epoch where none comes again, and row
Sample = tuple[Any, ...]
Collate = Callable[[list[Sample]], Any]
ToDevice = Callable[[Any], tuple[Any, ...]]


class KeyedExamples(Dataset):
    """Rows read, decoded and transformed by (view, row), each under a seed of its own.

    Args:
        rows: A split: `table`, and `example(row, item)`, which returns what the transform takes.
        transform: Maps an example to a sample.
        seed: Of all that is drawn for an image.
        alternate: Mirror the image, a sample's first part, every other view.
    """

    def __init__(
        self, rows: Any, transform: Callable[..., Sample], seed: int, *, alternate: bool = False
    ) -> None:
        self.rows = rows
        self.transform = transform
        self.seed = seed
        self.alternate = alternate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: list[Key]) -> list[Sample | DataError]:
        """Return samples; an error is returned too, as an exception loses its words on the way."""
        columns = self.rows.table[[row for _, row in keys]]
        items = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        return [self._sample(*key, item) for key, item in zip(keys, items, strict=True)]

    def _sample(self, view: int, row: int, item: dict[str, Any]) -> Sample | DataError:
        try:
            example = self.rows.example(row, item)
        except DataError as error:
            return error
        try:
            sample = transform_under(self.transform, example, derive_seed(self.seed, view, row))
            if self.alternate and mirrored_first(self.seed, row) ^ bool(view % 2):
                return sample[0].flip(-1), *sample[1:]
            return sample
        except (RuntimeError, ValueError) as error:  # as of an image of 3x2000, made 0 pixels high
            return DataError(
                f"{self.rows.place(row)} cannot be brought to size ({error}); remove or replace it"
            )


class KeyedBatches:
    """Training batches of keyed examples.

    The epoch's order is a permutation drawn from (seed, epoch), as on the tensor path; the
    transform of row i draws from a generator seeded by (seed, epoch, i), or of a view by (seed,
    view, i). Neither depends on the number of workers or processes, or on where a run was resumed.

    Args:
        examples: The training split's.
        collate: Makes a batch of samples.
        to_device: Moves a batch to its device, as the trainer takes it.
        batch_size: Examples a step over all processes.
        drawing: What the order is drawn from, and which view an epoch shows.
        share: This process's part.
        workers: Processes that read and transform; 0 does it in this one.
        pin: Whether the batches go to a GPU.

    Raises:
        DataError: If the split is smaller than a batch; while iterating, if an example cannot be
            read.
    """

    def __init__(
        self,
        examples: KeyedExamples,
        collate: Collate,
        to_device: ToDevice,
        *,
        batch_size: int,
        drawing: Drawing,
        share: Share,
        workers: int,
        pin: bool,
    ) -> None:
        self.count = len(examples)
        check_fills_a_batch(self.count, batch_size)
        self.to_device = to_device
        self.order = _Order(self.count, batch_size, drawing, share)
        self.reading = functools.partial(build_loader, examples, collate, pin=pin)
        self.workers = workers
        self.loader = self.reading(workers, batch_sampler=self.order)

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield an epoch's batches from step `start` on, both counted from 0."""
        self.order.epoch, self.order.start = epoch, start
        return on_device(self.loader, self.to_device)

    def rows(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows of each batch that `epoch` yields."""
        return self.order.rows(epoch, start)

    def of_view(
        self, view: int, rows: torch.Tensor, step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows, `step` at a time, and their images as they are augmented in a view."""
        parts = rows.cpu().split(step)
        keys = [[(view, row) for row in part.tolist()] for part in parts]
        workers = self.workers if len(parts) > self.workers else 0  # to start them takes longer
        loader = self.reading(workers, batch_sampler=keys, persistent=False)
        for part, (images, *_) in zip(parts, on_device(loader, self.to_device), strict=True):
            yield part, images


class KeyedEval:
    """A process's share of keyed examples, in order, none dropped or padded.

    Args:
        examples: The split's.
        collate: Makes a batch of samples.
        to_device: Moves a batch to its device, as the trainer takes it.
        batch_size: Examples a step over all processes.
        share: This process's part.
        workers: Processes that read and transform; 0 does it in this one.
        pin: Whether the batches go to a GPU.
    """

    def __init__(
        self,
        examples: KeyedExamples,
        collate: Collate,
        to_device: ToDevice,
        *,
        batch_size: int,
        share: Share,
        workers: int,
        pin: bool,
    ) -> None:
        self.count: int | None = len(examples)
        self.to_device = to_device
        step = max(1, batch_size // share.world_size)
        keys = [(0, int(row)) for row in share.of(torch.arange(len(examples)))]
        batches = [keys[i : i + step] for i in range(0, len(keys), step)]
        self.loader = build_loader(examples, collate, workers, pin=pin, batch_sampler=batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches."""
        return on_device(self.loader, self.to_device)


class _Order:
    """The rows of each of an epoch's batches, of which this process takes its share."""

    def __init__(self, count: int, batch_size: int, drawing: Drawing, share: Share) -> None:
        self.count, self.batch_size, self.drawing, self.share = count, batch_size, drawing, share
        self.steps = count // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def rows(self, epoch: int, start: int) -> Iterator[torch.Tensor]:
        order = self.drawing.order(epoch, self.count)
        batches = order[: self.steps * self.batch_size].split(self.batch_size)
        return map(self.share.of, batches[start:])

    def __iter__(self) -> Iterator[list[Key]]:
        view = self.drawing.view(self.epoch)
        for rows in self.rows(self.epoch, self.start):
            yield [(view, row) for row in rows.tolist()]


def transform_under(
    transform: Callable[..., Sample], example: tuple[Any, ...], seed: int
) -> Sample:
    """Transform an example under a seed, leaving the global generator as it was.

    torchvision draws from the CPU's global generator. `torch.manual_seed` would seed those of all
    devices too, and where CUDA has not begun, format a stack trace for each image.
    """
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        return transform(*example)
    finally:
        generator.set_state(state)


def stack(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels uint8 `[B, S, S, 3]` and targets `[B, ...]` of images of one size."""
    images, targets = zip(*samples, strict=True)
    pixels = torch.stack(images).permute(0, 2, 3, 1).contiguous()
    return pixels, torch.stack([torch.as_tensor(target) for target in targets])


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a plain tensor on a device, without waiting where the loader has pinned it."""
    return tensor.as_subclass(torch.Tensor).to(device, non_blocking=device.type == "cuda")


class PixelsToDevice:
    """Move a batch of pixels and targets to its device and normalise the pixels."""

    def __init__(self, normalize: Normalize) -> None:
        self.normalize = normalize

    def __call__(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return images `[B, 3, S, S]` and targets."""
        pixels, targets = (move(part, self.normalize.device) for part in batch)
        return self.normalize(pixels), targets


def build_loader(
    examples: Dataset,
    collate: Collate,
    workers: int,
    *,
    pin: bool,
    persistent: bool = True,
    **batching: Any,
) -> DataLoader:
    """Return a loader whose workers leave signals to the trainer and hand errors over as values."""
    end_workers_at_exit()
    return DataLoader(
        examples,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=pin,
        collate_fn=_Collate(collate),
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else each epoch draws from the global one
        **batching,
    )


class _Collate:
    """The first error among samples, or a batch of them; a class, for workers that are spawned."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample | DataError]) -> Any:
        good: list[Sample] = []
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
            good.append(sample)
        return self.collate(good)


def on_device(loader: Iterable[Any], to_device: ToDevice) -> Iterator[tuple[Any, ...]]:
    """Yield a loader's batches, on its device.

    Raises:
        DataError: That a worker met.
    """
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield to_device(batch)

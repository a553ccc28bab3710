"""Large sets: images read as they are needed, by a DataLoader with torchvision v2 transforms."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import IterableDataset as Stream
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from batches import Batch, Normalize, Share, derive_seed, epoch_generator
from interruption import SIGNALS
from sources import DataError, Rows

Key = tuple[int, int]  # epoch and row
Sample = tuple[torch.Tensor, int]


class LoaderBatches:
    """Augmented, normalised batches of rows that are read and decoded when their turn comes.

    The epoch's order is a permutation drawn from (seed, epoch), as on the tensor path; the
    transform of row i draws from a generator seeded by (seed, epoch, i). Neither depends on the
    number of workers or processes, or on where a run was resumed.

    Args:
        rows: The training split.
        transform: Maps an image to uint8 `[3, S, S]`.
        normalize: From pixels to floats.
        batch_size: Images a step over all processes.
        seed: The recipe's seed.
        share: This process's part.
        workers: Processes that read and transform; 0 does it in this one.

    Raises:
        DataError: If a label is out of range or the split smaller than a batch; while iterating,
            if an image cannot be read.
    """

    def __init__(
        self,
        rows: Rows,
        transform: v2.Compose,
        normalize: Normalize,
        *,
        batch_size: int,
        seed: int,
        share: Share,
        workers: int,
    ) -> None:
        self.count = len(rows)
        if self.count < batch_size:
            raise DataError(
                f"the training split has {self.count} images, fewer than batch_size={batch_size}"
            )
        self.normalize = normalize
        self.order = _Order(self.count, batch_size, seed, share)
        self.loader = _loader(
            _Images(rows, transform, seed), normalize, workers, batch_sampler=self.order
        )

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` in channels-last layout and labels `[B]` of one epoch."""
        self.order.epoch, self.order.start = epoch, start
        return _batches(self.loader, self.normalize)


class LoaderEval:
    """A process's share of a split, in order, read when its turn comes; nothing dropped or padded.

    Args:
        rows: The split; a stream is split by shards.
        transform: Maps an image to uint8 `[3, S, S]`.
        normalize: From pixels to floats.
        batch_size: Images a step over all processes.
        share: This process's part.
        workers: Processes that read and transform; 0 does it in this one.
    """

    def __init__(
        self,
        rows: Rows,
        transform: v2.Compose,
        normalize: Normalize,
        *,
        batch_size: int,
        share: Share,
        workers: int,
    ) -> None:
        step = max(1, batch_size // share.world_size)
        self.count = rows.count()
        self.normalize = normalize
        if isinstance(rows.table, Stream):
            images = _StreamedImages(rows, transform, 0, share)
            self.loader = _loader(images, normalize, images.useful(workers), batch_size=step)
        else:
            keys = [(0, int(row)) for row in share.of(torch.arange(len(rows)))]
            batches = [keys[i : i + step] for i in range(0, len(keys), step)]
            self.loader = _loader(
                _Images(rows, transform, 0), normalize, workers, batch_sampler=batches
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` and labels `[B]`."""
        return _batches(self.loader, self.normalize)


class StreamBatches:
    """Augmented, normalised batches of a stream, without a local copy of the dataset.

    The order is that of shards, shuffled by (seed, epoch), and of a shuffle buffer; it repeats for
    the same number of workers and processes. A worker that has seen all its shards starts over, so
    that every process takes the same number of steps. A resumed epoch skips forward, without
    decoding, to the rows that it would have read.

    Args:
        rows: The training split, a stream.
        transform: Maps an image to uint8 `[3, S, S]`.
        normalize: From pixels to floats.
        count: Images of an epoch; None takes the number in the dataset's card.
        batch_size: Images a step over all processes.
        buffer: Images of the shuffle buffer, still encoded.
        seed: The recipe's seed.
        share: This process's part.
        workers: Processes that read and transform; at most one a shard.

    Raises:
        DataError: If the number of images is unknown; while iterating, if an image cannot be read
            or a label is out of range.
    """

    def __init__(
        self,
        rows: Rows,
        transform: v2.Compose,
        normalize: Normalize,
        *,
        count: int | None,
        batch_size: int,
        buffer: int,
        seed: int,
        share: Share,
        workers: int,
    ) -> None:
        self.count = count or len(rows)
        self.steps = self.count // batch_size
        if not self.steps:
            raise DataError(
                f"the training split has {self.count} images, fewer than batch_size={batch_size}"
            )
        self.normalize = normalize
        self.batch_size = share.batch_size(batch_size)
        self.images = _StreamedImages(rows, transform, seed, share, buffer=buffer)
        self.loader = _loader(
            self.images,
            normalize,
            self.images.useful(workers),
            batch_size=self.batch_size,
            persistent=False,  # each epoch's workers start from its number
        )

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` in channels-last layout and labels `[B]` of one epoch."""
        # batches come from the workers in turn: skip whole turns in them, the rest here
        turns, rest = divmod(start, max(1, self.loader.num_workers))
        self.images.epoch, self.images.skip = epoch, turns * self.batch_size
        batches = _batches(self.loader, self.normalize)
        yield from itertools.islice(batches, rest, rest + self.steps - start)


class _Order:
    """The rows of each of an epoch's batches, of which this process takes its share."""

    def __init__(self, count: int, batch_size: int, seed: int, share: Share) -> None:
        self.count, self.batch_size, self.seed, self.share = count, batch_size, seed, share
        self.steps = count // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.count, generator=epoch_generator(self.seed, self.epoch))
        batches = order[: self.steps * self.batch_size].split(self.batch_size)
        for rows in map(self.share.of, batches[self.start :]):
            yield [(self.epoch, row) for row in rows.tolist()]


class _Images(Dataset):
    """Rows read, decoded and transformed by (epoch, row)."""

    def __init__(self, rows: Rows, transform: v2.Compose, seed: int) -> None:
        self.rows = rows
        self.labels = rows.labels()
        self.transform = transform
        self.seed = seed

    def __getitems__(self, keys: list[Key]) -> list[Sample | DataError]:
        """Return samples; an error is returned too, as an exception loses its words on the way."""
        items = self.rows.table[[row for _, row in keys]][self.rows.image_column]
        return [self._sample(*key, item) for key, item in zip(keys, items, strict=True)]

    def _sample(self, epoch: int, row: int, item: dict[str, Any]) -> Sample | DataError:
        try:
            image = self.rows.read(item, self.rows.place(row))
        except DataError as error:
            return error
        seed = derive_seed(self.seed, epoch, row)
        return _transform(self.transform, image, seed), int(self.labels[row])


class _StreamedImages(IterableDataset):
    """Rows of a stream, decoded and transformed, this process's and this worker's alone."""

    def __init__(
        self, rows: Rows, transform: v2.Compose, seed: int, share: Share, *, buffer: int = 0
    ) -> None:
        self.rows, self.transform, self.seed, self.share = rows, transform, seed, share
        self.buffer = buffer
        self.epoch = self.skip = 0

    def useful(self, workers: int) -> int:
        """Return how many of the workers would get a shard to read."""
        return min(workers, self._own(self.rows.table).num_shards)

    def __iter__(self) -> Iterator[Sample | DataError]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        for count, item in enumerate(self._items()):
            if count >= self.skip:
                yield self._sample(item, (self.epoch, self.share.rank, number, count))

    def _items(self) -> Iterator[dict[str, Any]]:
        if not self.buffer:
            yield from self._own(self.rows.table)
            return
        for again in itertools.count():
            # not by set_epoch: workers share that number, and one may start over before another
            seed = derive_seed(self.seed, self.epoch, again)
            yield from self._own(self.rows.table.shuffle(seed=seed, buffer_size=self.buffer))

    def _own(self, table: Any) -> Any:
        return split_dataset_by_node(table, self.share.rank, self.share.world_size)

    def _sample(self, item: dict[str, Any], key: tuple[int, ...]) -> Sample | DataError:
        label, encoded = item[self.rows.label_column], item[self.rows.image_column]
        try:
            if label is None or not 0 <= label < self.rows.classes:
                raise self.rows.label_error(self._place(encoded, key), label)
            image = self.rows.read(encoded, self._place(encoded, key))
        except DataError as error:
            return error
        return _transform(self.transform, image, derive_seed(self.seed, *key)), label

    def _place(self, encoded: dict[str, Any], key: tuple[int, ...]) -> str:
        """Return what a stream tells of where an image was: no row, but a file where it has one."""
        epoch, rank, worker, count = key
        order = "shuffled stream" if self.buffer else "stream"
        reader = f"worker {worker} of process {rank}, epoch {epoch + 1}"
        file = f", file {encoded['path']}" if encoded.get("path") else ""
        return f"image {count + 1} of the {order} of {self.rows.where} ({reader}{file})"


def _transform(transform: v2.Compose, image: Any, seed: int) -> torch.Tensor:
    with torch.random.fork_rng([]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        return transform(image)


def _loader(
    images: Dataset, normalize: Normalize, workers: int, *, persistent: bool = True, **batching: Any
) -> DataLoader:
    return DataLoader(
        images,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=normalize.device.type == "cuda",
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else each epoch draws from the global one
        **batching,
    )


def _ignore_signals(_: int) -> None:
    """Leave the end to the process that trains: a signal to all must not cost it its images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End workers that a live loader still has at exit.

    multiprocessing would ask them by SIGTERM, which they ignore, and wait for ever. It registered
    before this module did, so this comes first.
    """
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report them as killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:  # those that it ends without being asked
            process.kill()


def _collate(samples: list[Sample | DataError]) -> Batch | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).permute(0, 2, 3, 1).contiguous(), torch.tensor(labels)


def _batches(loader: Iterable[Batch | DataError], normalize: Normalize) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        pixels, labels = (part.to(normalize.device, non_blocking=True) for part in batch)
        yield normalize(pixels), labels

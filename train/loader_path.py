"""Large sets of classified images: read as they are needed, from rows or from a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import IterableDataset as Stream
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.transforms import v2

from batches import Batch, Normalize, Share, derive_seed
from keyed_loader import (
    KeyedBatches,
    KeyedEval,
    KeyedExamples,
    Sample,
    build_loader,
    finished,
    transform_under,
)
from rows import DataError, Rows


class LoaderBatches(KeyedBatches):
    """Augmented, normalised batches of rows that are read and decoded when their turn comes.

    A batch is images `[B, 3, S, S]` in channels-last layout and labels `[B]`.

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
        rows.labels()  # all in range, or an error
        super().__init__(
            KeyedExamples(rows, transform, seed),
            _collate,
            _Finish(normalize),
            batch_size=batch_size,
            seed=seed,
            share=share,
            workers=workers,
            pin=normalize.device.type == "cuda",
        )


def loader_eval(
    rows: Rows,
    transform: v2.Compose,
    normalize: Normalize,
    *,
    batch_size: int,
    share: Share,
    workers: int,
) -> KeyedEval | StreamEval:
    """Return a process's share of a split, in order, read when its turn comes.

    Args:
        rows: The split; a stream is split by shards.
        transform: Maps an image to uint8 `[3, S, S]`.
        normalize: From pixels to floats.
        batch_size: Images a step over all processes.
        share: This process's part.
        workers: Processes that read and transform; 0 does it in this one.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, share=share, workers=workers)
    if isinstance(rows.table, Stream):
        return StreamEval(rows, transform, normalize, **options)
    rows.labels()  # all in range, or an error
    return KeyedEval(
        KeyedExamples(rows, transform, 0),
        _collate,
        _Finish(normalize),
        pin=normalize.device.type == "cuda",
        **options,
    )


class StreamEval:
    """A process's share of a stream's shards, in order, none dropped or padded.

    Arguments as `loader_eval`'s.
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
        self.count = rows.count()
        self.finish = _Finish(normalize)
        images = _StreamedImages(rows, transform, 0, share)
        self.loader = build_loader(
            images,
            _collate,
            images.useful(workers),
            pin=normalize.device.type == "cuda",
            batch_size=max(1, batch_size // share.world_size),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` and labels `[B]`."""
        return finished(self.loader, self.finish)


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
        self.finish = _Finish(normalize)
        self.batch_size = share.batch_size(batch_size)
        self.images = _StreamedImages(rows, transform, seed, share, buffer=buffer)
        self.loader = build_loader(
            self.images,
            _collate,
            self.images.useful(workers),
            pin=normalize.device.type == "cuda",
            persistent=False,  # each epoch's workers start from its number
            batch_size=self.batch_size,
        )

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` in channels-last layout and labels `[B]` of one epoch."""
        # batches come from the workers in turn: skip whole turns in them, the rest here
        turns, rest = divmod(start, max(1, self.loader.num_workers))
        self.images.epoch, self.images.skip = epoch, turns * self.batch_size
        batches = finished(self.loader, self.finish)
        yield from itertools.islice(batches, rest, rest + self.steps - start)


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
        items = enumerate(self._items())
        while True:
            try:
                count, item = next(items)
            except StopIteration:
                return
            except Exception as error:  # of the network, the hub, or a file that was cut
                yield DataError(
                    f"the stream of {self.rows.where} broke off ({type(error).__name__}: {error}); "
                    "go on with --resume"
                )
                return
            if count >= self.skip:
                yield self._sample(item, (self.epoch, self.share.rank, number, count))

    def _items(self) -> Iterator[dict[str, Any]]:
        if not self.buffer:
            yield from self._own(self.rows.table)
            return
        for again in itertools.count():
            # not by set_epoch: workers share that number, and one may start over before another
            seed = derive_seed(self.seed, self.epoch, again)
            empty = True
            for item in self._own(self.rows.table.shuffle(seed=seed, buffer_size=self.buffer)):
                empty = False
                yield item
            if empty:
                raise ValueError("there is no image in it")

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
        return transform_under(self.transform, (image, label), derive_seed(self.seed, *key))

    def _place(self, encoded: dict[str, Any], key: tuple[int, ...]) -> str:
        """Return what a stream tells of where an image was: no row, but a file where it has one."""
        epoch, rank, worker, count = key
        order = "shuffled stream" if self.buffer else "stream"
        reader = f"worker {worker} of process {rank}, epoch {epoch + 1}"
        file = f", file {encoded['path']}" if encoded and encoded.get("path") else ""
        return f"image {count + 1} of the {order} of {self.rows.where} ({reader}{file})"


def _collate(samples: list[Sample]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).permute(0, 2, 3, 1).contiguous(), torch.tensor(labels)


class _Finish:
    """Move a batch to its device and normalise its images."""

    def __init__(self, normalize: Normalize) -> None:
        self.normalize = normalize

    def __call__(self, batch: Batch) -> Batch:
        pixels, labels = (part.to(self.normalize.device, non_blocking=True) for part in batch)
        return self.normalize(pixels), labels

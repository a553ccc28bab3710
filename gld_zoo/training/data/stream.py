"""Classified images that are read in order from where they lie, without a local copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import Batch, Normalize, Share, check_fills_a_batch, derive_seed
from gld_zoo.training.data.keyed import (
    PixelsToDevice,
    Sample,
    build_loader,
    on_device,
    stack,
    transform_under,
)
from gld_zoo.training.data.rows import Rows, file_of


class StreamEval:
    """A process's share of a stream's shards, in order, none dropped or padded.

    Args:
        rows: The split, a stream.
        transform: Maps an image to uint8 `[3, S, S]`.
        normalize: From pixels to floats.
        batch_size: Images a step over all processes.
        share: This process's part.
        workers: Processes that read and transform; at most one a shard.
    """

    def __init__(
        self,
        rows: Rows,
        transform: v2.Transform,
        normalize: Normalize,
        *,
        batch_size: int,
        share: Share,
        workers: int,
    ) -> None:
        self.count = rows.count()
        self.to_device = PixelsToDevice(normalize)
        images = _StreamedImages(rows, transform, 0, share)
        self.loader = build_loader(
            images,
            stack,
            images.useful(workers),
            pin=normalize.device.type == "cuda",
            batch_size=max(1, batch_size // share.world_size),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield images `[B, 3, S, S]` and labels `[B]`."""
        return on_device(self.loader, self.to_device)


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
        transform: v2.Transform,
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
        check_fills_a_batch(self.count, batch_size)
        self.steps = self.count // batch_size
        self.to_device = PixelsToDevice(normalize)
        self.batch_size = share.batch_size(batch_size)
        self.images = _StreamedImages(rows, transform, seed, share, buffer=buffer)
        self.loader = build_loader(
            self.images,
            stack,
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
        batches = on_device(self.loader, self.to_device)
        yield from itertools.islice(batches, rest, rest + self.steps - start)


class _StreamedImages(IterableDataset):
    """Rows of a stream, decoded and transformed, this process's and this worker's alone."""

    def __init__(
        self,
        rows: Rows,
        transform: v2.Transform,
        seed: int,
        share: Share,
        *,
        buffer: int = 0,
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
        value, encoded = item[self.rows.label_column], item[self.rows.image_column]
        label = self.rows.class_of(value)
        try:
            if label is None:
                raise self.rows.label_error(self._place(key) + file_of(encoded), value)
            image = self.rows.read(encoded, self._place(key))
        except DataError as error:
            return error
        return transform_under(self.transform, (image, label), derive_seed(self.seed, *key))

    def _place(self, key: tuple[int, ...]) -> str:
        """Return what a stream tells of where an image was, which is not its row."""
        epoch, rank, worker, count = key
        order = "shuffled stream" if self.buffer else "stream"
        reader = f"worker {worker} of process {rank}, epoch {epoch + 1}"
        return f"image {count + 1} of the {order} of {self.rows.where} ({reader})"

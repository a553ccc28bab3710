"""Images of a stream: each once an epoch, in an order that repeats and can be resumed."""

import re

import pytest
import torch
from datasets import Dataset
from test_keyed import NORMALIZE, collect

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import Share, Transforms
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.data.stream import StreamBatches
from helpers import FEATURES, write_dataset


@pytest.fixture(scope="module")
def stream(tmp_path_factory, rows):
    """A stream of four shards, whose card tells nothing."""
    folder = tmp_path_factory.mktemp("stream")
    for split, shards in (("train", 4), ("test", 1)):
        for shard in range(shards):
            columns = {key: column[shard::shards][:16] for key, column in rows[split].items()}
            path = folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_dict(columns, features=FEATURES).to_parquet(str(path))
    return ImageSource(str(folder), streaming=True)


def streamed(stream, **options):
    defaults = dict(count=64, batch_size=16, buffer=32, seed=3, share=Share(), workers=0)
    transform = Transforms(24).training()
    return StreamBatches(stream.train, transform, NORMALIZE, **{**defaults, **options})


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9))])
def test_a_stream_repeats_and_a_resumed_one_goes_on(stream, workers):
    batches = streamed(stream, workers=workers)
    assert len(batches) == 4
    expected, _ = collect(batches.epoch(1))
    assert torch.equal(collect(streamed(stream, workers=workers).epoch(1))[0], expected)
    assert torch.equal(collect(batches.epoch(1, start=3))[0], expected[3:])
    assert not torch.equal(collect(batches.epoch(0))[0], expected)


def test_a_stream_shows_each_image_once_an_epoch_and_each_process_its_own(stream):
    transform = Transforms(24).fit()
    for world_size in (1, 2):
        seen = []
        for rank in range(world_size):
            batches = streamed(stream, share=Share(rank, world_size))
            batches.images.transform = transform
            images, _ = collect(batches.epoch(0))
            seen += [tuple(image.flatten().tolist()) for image in images.flatten(0, 1)]
        assert len(set(seen)) == 64


def test_an_unreadable_image_of_a_stream_is_named_by_what_the_stream_tells(tmp_path, rows):
    columns = {key: list(column[:32]) for key, column in rows["train"].items()}
    columns["img"][21] = {"bytes": b"no image", "path": "broken.png"}
    folder = write_dataset(tmp_path, dict(train=columns, test=rows["test"]))
    source = ImageSource(str(folder), streaming=True)
    with pytest.raises(DataError) as error:
        list(streamed(source, count=32).epoch(0))
    place, file = r"image \d+ of the shuffled stream of split 'train' of ", "file broken.png"
    assert re.match(place, str(error.value))
    assert str(error.value).count(file) == 1
    assert "row" not in str(error.value)


def test_a_null_image_of_a_stream_is_named(tmp_path, rows):
    columns = {key: list(column[:32]) for key, column in rows["train"].items()}
    columns["img"][5] = None
    folder = write_dataset(tmp_path, dict(train=columns, test=rows["test"]))
    source = ImageSource(str(folder), streaming=True)
    with pytest.raises(
        DataError, match=r"image \d+ of the shuffled stream .* not a readable image"
    ):
        list(streamed(source, count=32).epoch(0))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"broke off \(ValueError: there is no image in it\); go on with --resume"),
        (None, r"broke off \(ConnectionError: gone\); go on with --resume"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error_of_the_data(stream, monkeypatch, items, message):
    def own(self, table):
        if items is None:
            raise ConnectionError("gone")
        return iter(items)

    batches = streamed(stream, workers=0)
    monkeypatch.setattr("gld_zoo.training.data.stream._StreamedImages._own", own)
    with pytest.raises(DataError, match=message):
        list(batches.epoch(0))


def test_a_stream_without_a_count_says_what_to_set(stream):
    with pytest.raises(DataError, match="set train_images"):
        streamed(stream, count=None)

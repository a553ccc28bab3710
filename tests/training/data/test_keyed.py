"""Images read when needed: the same images whatever the workers, processes and resumes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import Drawing, Normalize, Share, Transforms, measuring_transform
from gld_zoo.training.data.keyed import (
    KeyedBatches,
    KeyedExamples,
    PixelsToDevice,
    stack,
    transform_under,
)
from gld_zoo.training.data.loaders import eval_batches
from gld_zoo.training.data.memory import MemoryEval, decode
from gld_zoo.training.data.sources import ImageSource
from helpers import CHECKOUT, write_dataset

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZE = Normalize(MEAN, STD, torch.device("cpu"))
TRANSFORMS = Transforms(24, crop="resized")


@pytest.fixture(scope="module")
def source(tiny_dataset):
    return ImageSource(str(tiny_dataset))


def batches_of(source, **options):
    options = {**dict(batch_size=16, seed=3, share=Share(), workers=0, pin=False), **options}
    drawing = options.pop("drawing", None) or Drawing(options["seed"])
    del options["seed"]
    examples = KeyedExamples(source.train, TRANSFORMS.training(), drawing.of_images)
    return KeyedBatches(examples, stack, PixelsToDevice(NORMALIZE), drawing=drawing, **options)


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.stack(images), torch.stack(labels)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(source, workers):
    expected, labels = collect(batches_of(source).epoch(2))
    images, targets = collect(batches_of(source, workers=workers).epoch(2))
    assert torch.equal(images, expected)
    assert torch.equal(targets, labels)
    first, _ = next(batches_of(source).epoch(2))
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_a_resumed_epoch_goes_on_where_it_stopped(source):
    batches = batches_of(source, workers=2)
    expected, _ = collect(batches.epoch(1))
    assert torch.equal(collect(batches.epoch(1, start=2))[0], expected[2:])
    assert torch.equal(collect(batches.epoch(1))[0], expected)
    assert not torch.equal(collect(batches.epoch(0))[0], expected)


def test_processes_share_each_global_batch(source):
    expected, _ = collect(batches_of(source).epoch(1))
    for rank in range(2):
        images, _ = collect(batches_of(source, share=Share(rank, 2)).epoch(1))
        assert torch.equal(images, expected[:, rank::2])


def test_augmentation_differs_between_images_and_epochs_and_leaves_the_global_generator(source):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    batches = batches_of(source)
    first, _ = collect(batches.epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    second, _ = collect(batches.epoch(1))
    assert len({tuple(image.flatten().tolist()) for image in first.flatten(0, 1)}) == 64
    assert first.mean() != second.mean()


def test_the_padded_crops_are_drawn_over_the_border_and_mirrored():
    step = Transforms(6, crop_padding=2).training()
    place = PILImage.fromarray(np.arange(1, 37, dtype=np.uint8).reshape(6, 6)).convert("RGB")
    centres = [step(place)[0, 2, 2:4].int() - 1 for _ in range(300)]
    mirrored = sum(bool(pair[1] < pair[0]) for pair in centres)
    assert {int(pair[0]) // 6 for pair in centres} == {0, 1, 2, 3, 4}
    assert {int(pair.min()) % 6 for pair in centres} == {0, 1, 2, 3, 4}
    assert 110 < mirrored < 190
    still = Transforms(6, crop_padding=0, flip=False).training()
    assert torch.equal(still(place), v2.functional.pil_to_tensor(place))


def test_measured_images_are_those_of_the_tensor_path(source):
    config = dict(interpolation="bilinear", crop_pct=0.875, mean=MEAN, std=STD)
    split = decode(source.test, measuring_transform(config, 24), 24)
    for world_size in (1, 2):
        for rank in range(world_size):
            options = dict(batch_size=8, share=Share(rank, world_size))
            expected = list(MemoryEval(split, NORMALIZE, **options))
            options.update(workers=1, in_memory=False)
            found = eval_batches(source.test, config, 24, NORMALIZE.device, **options)
            for (images, labels), (theirs, targets) in zip(found, expected, strict=True):
                assert torch.equal(images, theirs)
                assert torch.equal(labels, targets)


@pytest.mark.slow
def test_workers_end_with_their_process_though_its_loader_lives(tiny_dataset):
    """They ignore the signal by which multiprocessing ends them at exit, and waits for them."""
    lines = ["import sys", "from test_keyed import *", "source = ImageSource(sys.argv[1])"]
    lines += ["batches = batches_of(source, workers=1)", "next(batches.epoch(0))"]
    paths = [str(CHECKOUT), str(CHECKOUT / "tests"), str(Path(__file__).parent)]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(tiny_dataset)],
        check=True,
        timeout=100,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
    )
    assert "Traceback" not in result.stderr


def test_an_unreadable_image_in_a_worker_is_named_by_row(tmp_path, rows):
    columns = {key: list(column[:32]) for key, column in rows["train"].items()}
    columns["img"][21] = {"bytes": b"no image", "path": None}
    folder = write_dataset(tmp_path, dict(train=columns, test=rows["test"]))
    batches = batches_of(ImageSource(str(folder)), workers=2)
    with pytest.raises(DataError, match=r"^row 21 of split 'train'.*not a readable image"):
        list(batches.epoch(0))


def test_rows_held_out_are_balanced_and_the_rest_is_kept(source):
    kept, held = source.train.hold_out(0.25, seed=1)
    labels = source.train.labels()
    assert sorted([*kept.numbers.tolist(), *held.numbers.tolist()]) == list(range(64))
    for label, count in enumerate(labels.bincount().tolist()):
        assert (held.labels() == label).sum() == round(0.25 * count)
    assert torch.equal(labels[held.numbers], held.labels())
    assert torch.equal(source.train.hold_out(0.25, seed=1)[1].numbers, held.numbers)
    for fraction, counts in ((0.001, [1] * 4), (0.999, (labels.bincount() - 1).tolist())):
        assert source.train.hold_out(fraction, seed=1)[1].labels().bincount().tolist() == counts
    assert not torch.equal(source.train.hold_out(0.25, seed=2)[1].numbers, held.numbers)


def test_an_image_folder_of_mixed_sizes_and_modes_is_read(tmp_path, rows):
    modes = ["RGB", "L", "CMYK", "P", "RGBA", "1"]
    for split in ("train", "test"):
        for name in ("one", "two"):
            (tmp_path / split / name).mkdir(parents=True)
        for i, mode in enumerate(modes):
            image = PILImage.open(io.BytesIO(rows[split]["img"][i]["bytes"])).convert("RGB")
            name = f"{i}.jpg" if mode == "CMYK" else f"{i}.png"
            folder = tmp_path / split / ("one" if i % 2 else "two")
            image.resize((40 + i, 60 - i)).convert(mode).save(folder / name)
    images, _ = collect(batches_of(ImageSource(str(tmp_path)), batch_size=6).epoch(0))
    assert images.shape == (1, 6, 3, 24, 24)


def test_an_images_seed_gives_the_draws_of_torchs_own_and_leaves_the_generator():
    def draw(image):
        return image, torch.rand(3), torch.randperm(5)

    torch.manual_seed(7)
    with torch.random.fork_rng([]):
        torch.manual_seed(1234)
        expected = draw("image")
    after = torch.rand(2)
    torch.manual_seed(7)
    found = transform_under(draw, ("image",), 1234)
    assert torch.equal(torch.rand(2), after)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ZeroDivisionError):
        transform_under(lambda: 1 / 0, (), 5)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), after)

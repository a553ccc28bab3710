"""What happens to training images besides the crop: the same on every path, at every resume."""

import pickle
import random

import pytest
import timm
import torch
import torch.nn.functional as F

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import (
    Drawing,
    Normalize,
    Share,
    Transforms,
    cut_out,
    mirrored_first,
)
from gld_zoo.training.data.keyed import KeyedBatches
from gld_zoo.training.data.loaders import load_data
from gld_zoo.training.data.memory import MemoryBatches, Split
from gld_zoo.training.data.mixing import MixedBatches, cut_and_mix, mix
from gld_zoo.training.data.sources import open_source

CPU = torch.device("cpu")
PIXELS = Normalize((0, 0, 0), (1 / 255,) * 3, CPU)  # leaves 0 to 255 as they are
ALONE = Share()
COUNT = 32


def numbered(count=COUNT, size=32):
    """Images whose pixels, and whose class, are their number."""
    number = torch.arange(count)
    images = number.to(torch.uint8)[:, None, None, None].expand(count, size, size, 3)
    return Split(images.clone(), number)


def batches_of(split, normalize=PIXELS, **options):
    defaults = dict(batch_size=8, crop_padding=0, flip=False, seed=3, share=ALONE)
    options = {**defaults, **options}
    return MemoryBatches(split, normalize, drawing=Drawing(options.pop("seed")), **options)


def mixed(mixup=0.0, cutmix=0.0, batch_size=8, seed=3, share=ALONE):
    options = dict(batch_size=batch_size, seed=seed, share=share)
    return MixedBatches(
        batches_of(numbered(), **options), classes=COUNT, mixup=mixup, cutmix=cutmix, **options
    )


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return torch.stack(images), torch.stack(labels)


def loaded(dataset, share=ALONE, **options):
    """Return the training batches of a recipe: whole, upright images unless it says else."""
    defaults = dict(student="gld_wrn16_1", batch_size=16, crop_padding=0, flip=False, workers=0)
    recipe = Recipe(dataset=str(dataset), **{**defaults, **options})
    config = timm.data.resolve_data_config({}, model=timm.create_model(recipe.student))
    return load_data(open_source(recipe), recipe, config, CPU, share).train


MIXES = pytest.mark.parametrize(
    "options",
    [dict(mixup=1.0), dict(cutmix=1.0), dict(mixup=0.4, cutmix=1.0)],
    ids=["mixup", "cutmix", "either"],
)


@MIXES
def test_each_image_is_mixed_with_that_half_a_batch_on_by_the_share_its_label_says(options):
    for epoch in range(5):
        plain = batches_of(numbered()).epoch(epoch)
        for (images, labels), (_, own) in zip(mixed(**options).epoch(epoch), plain, strict=True):
            torch.testing.assert_close(labels.sum(1), torch.ones(8))
            share = labels[0, own[0]]
            expected = share * F.one_hot(own, COUNT) + (1 - share) * F.one_hot(own.roll(4), COUNT)
            torch.testing.assert_close(labels, expected)
            # the mean pixel tells both numbers and the shares of the pixels
            torch.testing.assert_close(images.mean((1, 2, 3)), labels @ torch.arange(32.0))


@MIXES
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_each_mixed_batch(options, world_size):
    whole = collect(mixed(**options).epoch(1))
    for rank in range(world_size):
        part = collect(mixed(**options, share=Share(rank, world_size)).epoch(1))
        for ours, all_rows in zip(part, whole, strict=True):
            assert torch.equal(ours, all_rows[:, rank::world_size])


@MIXES
def test_a_resumed_epoch_mixes_as_the_unbroken_one(options):
    batches = mixed(**options)
    assert (len(batches), batches.count) == (4, COUNT)
    whole = collect(batches.epoch(1))
    for start in (1, 3):
        rest = collect(mixed(**options).epoch(1, start))
        assert all(torch.equal(ours, rows[start:]) for ours, rows in zip(rest, whole, strict=True))


@MIXES
def test_steps_epochs_and_seeds_mix_by_shares_of_their_own(options):
    runs = (mixed(**options), 0), (mixed(**options), 1), (mixed(**options, seed=4), 0)
    shares = [
        labels[0].max().item() for batches, epoch in runs for _, labels in batches.epoch(epoch)
    ]
    assert len(shares) == 12
    assert len(set(shares)) > 9  # of few pixels, two rectangles may cover as many


def test_with_both_some_steps_blend_and_some_cut():
    cut = blended = 0
    for epoch in range(40):
        for images, labels in mixed(mixup=1.0, cutmix=1.0).epoch(epoch):
            flat = (images == images[:, :, :1, :1]).flatten(1).all(1)
            whole = labels.max(1).values == 1  # an empty rectangle, or one of all
            blended += int((flat & ~whole).all())
            cut += int((~flat).all())
    assert 50 < blended < 110  # of 160
    assert 40 < cut < 100


@pytest.mark.parametrize("shape", [(8, 3, 12, 12), (2, 3, 9, 16)])
def test_cutmix_puts_one_rectangle_in_all_images_and_counts_its_pixels(shape):
    images = torch.rand(shape)
    before, other = images.clone(), images.roll(shape[0] // 2, 0)
    draw = random.Random(0)
    areas = []
    for own in (0.0, 0.25, 0.5, 0.9, 1.0) * 20:
        found, share = cut_and_mix(images, own, draw)
        assert torch.equal(images, before)
        inside = (found == other).all(1)
        assert torch.equal(found, torch.where(inside[:, None], other, images))
        assert (inside == inside[:1]).all()
        assert_rectangles(inside)
        assert share == pytest.approx(1 - inside[0].float().mean().item())
        assert share >= own - 1e-9
        areas.append(1 - share)
    assert max(areas) > 0.5
    assert min(areas) == 0


def test_mixup_is_a_weighted_mean_with_the_other_half():
    values = torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(mix(values, 0.3), 0.3 * values + 0.7 * values.roll(3, 0))
    assert torch.equal(mix(values, 1.0), values)


@MIXES
@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 1), (6, 2), (4, 4)])
def test_a_batch_that_cannot_be_paired_is_named(options, batch_size, world_size):
    with pytest.raises(DataError, match=f"batch_size={batch_size} cannot be mixed in pairs"):
        mixed(**options, batch_size=batch_size, share=Share(0, world_size))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_recipe_mixes_on_both_paths_alike(tiny_dataset, in_memory):
    plain = loaded(tiny_dataset, in_memory=in_memory)
    images, labels = collect(loaded(tiny_dataset, mixup=1.0, in_memory=in_memory).epoch(0))
    assert labels.shape == (4, 16, 4)
    for (pixels, target), found, mix_of in zip(plain.epoch(0), images, labels, strict=True):
        same, other = target == target.roll(8), torch.arange(16)
        share = mix_of[other, target][~same][0].item()
        torch.testing.assert_close(found, mix(pixels, share), rtol=1e-5, atol=1e-5)
    elsewhere = collect(loaded(tiny_dataset, mixup=1.0, in_memory=not in_memory).epoch(0))
    assert torch.equal(images, elsewhere[0])
    assert torch.equal(labels, elsewhere[1])
    with pytest.raises(DataError, match="batch_size=6 cannot be mixed in pairs within"):
        loaded(tiny_dataset, Share(0, 2), batch_size=6, cutmix=1.0, in_memory=in_memory)


def by_image(batches, epoch):
    """Return the images of an epoch in the order of the split, whose classes are their numbers."""
    images, labels = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(images)[torch.cat(labels).argsort()]


def random_split(count=COUNT, size=8):
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
    return Split(images, torch.arange(count))


def test_alternate_mirrors_each_image_in_one_of_two_epochs():
    split = random_split()
    upright = PIXELS(split.images)
    batches = batches_of(split, flip="alternate")
    epochs = [by_image(batches, epoch) for epoch in range(4)]
    mirrored = [(images == upright.flip(3)).flatten(1).all(1) for images in epochs]
    for images, flips in zip(epochs, mirrored, strict=True):
        assert torch.equal(
            images, torch.where(flips[:, None, None, None], upright.flip(3), upright)
        )
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])


def test_alternate_begins_with_half_of_the_images_others_for_another_seed():
    first, second = (
        torch.tensor([mirrored_first(seed, row) for row in range(1000)]) for seed in (0, 1)
    )
    for part in (first, second, first ^ second):
        assert 450 < part.sum() < 550  # 500, within three standard deviations


def test_alternate_mirrors_the_same_images_on_both_paths_with_any_number_of_workers(tiny_dataset):
    paths = [
        loaded(tiny_dataset, flip="alternate", **options)
        for options in (
            dict(in_memory=True),
            dict(in_memory=False, workers=0),
            dict(in_memory=False, workers=2),
        )
    ]
    upright = loaded(tiny_dataset)
    for epoch in (0, 1):
        plain, _ = collect(upright.epoch(epoch))
        expected, labels = collect(paths[0].epoch(epoch))
        mirrored = (expected != plain).flatten(2).any(2).sum()
        assert 16 < mirrored < 48
        for path in paths[1:]:
            images, targets = collect(path.epoch(epoch))
            assert torch.equal(images, expected)
            assert torch.equal(targets, labels)


def test_alternate_is_refused_for_a_stream():
    with pytest.raises(ValueError, match="flip=alternate needs the images' numbers"):
        Recipe(student="gld_resnet20", streaming=True, flip="alternate")


def assert_rectangles(inside):
    """Hold masks `[B, H, W]` to be one rectangle each, or empty; return its sides `[B, 2]`."""
    sides = (inside.any(2), inside.any(1))
    assert torch.equal(inside, sides[0][:, :, None] & sides[1][:, None, :])
    for side in sides:
        steps = F.pad(side.int(), (1, 1)).diff().abs().sum(1)
        assert (steps <= 2).all()  # one stretch
    return torch.stack([side.sum(1) for side in sides], 1)


def assert_squares(inside, side):
    """Hold masks to be squares that are smaller only where the border cuts them."""
    lengths = assert_rectangles(inside)
    size = inside.shape[1]
    for axis, lines in enumerate((inside.any(2), inside.any(1))):
        at_border = lines[:, 0] | lines[:, size - 1]
        assert (lengths[~at_border, axis] == side).all()
        assert (lengths[:, axis] >= side // 2).all()
        assert (lengths[:, axis] <= side).all()


@pytest.mark.parametrize("side", [1, 4, 5])
def test_a_square_round_each_place_takes_the_colour_and_nothing_else_does(side):
    size, colour = 12, torch.tensor([10, 20, 30], dtype=torch.uint8)
    images = torch.randint(100, 256, (4, size, size, 3), dtype=torch.uint8)
    rows, columns = torch.tensor([6, 0, 11, 3]), torch.tensor([5, 0, 6, 11])
    expected = images.clone()
    for image, row, column in zip(expected, rows.tolist(), columns.tolist(), strict=True):
        top, left = row - side // 2, column - side // 2
        image[max(0, top) : top + side, max(0, left) : left + side] = colour
    before = images.clone()
    assert torch.equal(cut_out(images, rows, columns, side, colour), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("side", [3, 4])
@pytest.mark.parametrize("flip", [True, False, "alternate"])
def test_cutout_takes_squares_and_moves_no_other_draw(side, flip):
    split, padding = random_split(400, 12), 2  # of 8 within a border
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), CPU)
    options = dict(normalize=normalize, crop_padding=padding, flip=flip)
    plain = by_image(batches_of(split, **options), 1)
    batches = batches_of(split, **options, cutout=side)
    holes = by_image(batches, 1)
    inside = (holes != plain).any(1)
    assert_squares(inside, side)
    colour = normalize(normalize.mean_pixel[None, None, None])
    assert torch.equal(holes, torch.where(inside[:, None], colour, plain))
    assert colour.abs().max() < 0.01  # the mean, to half of a step of 255
    assert torch.equal(by_image(batches, 1), holes)
    other = (by_image(batches, 2) != by_image(batches_of(split, **options), 2)).any(1)
    assert not torch.equal(other, inside)
    # line and column are drawn apart: of the 64 centres, four and more reach even a corner
    assert inside.float().mean(0).min() > 0.03


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_recipes_cutout_is_a_square_of_the_mean_colour_on_both_paths(tiny_dataset, in_memory):
    options = dict(in_memory=in_memory, flip=True, crop_padding=4)
    plain, _ = collect(loaded(tiny_dataset, **options).epoch(1))
    holes, _ = collect(loaded(tiny_dataset, cutout=8, **options).epoch(1))
    inside = (holes != plain).any(2).flatten(0, 1)
    assert_squares(inside, 8)
    values = holes.flatten(0, 1).permute(0, 2, 3, 1)[inside]
    assert (values == values[0]).all()
    assert values[0].abs().max() < 0.01
    for again in (0, 2):
        found, _ = collect(loaded(tiny_dataset, cutout=8, workers=again, **options).epoch(1))
        assert torch.equal(found, holes)


@pytest.mark.parametrize(
    "options", [dict(augment="trivial"), dict(augment="rand"), dict(erasing=0.5)], ids=str
)
def test_what_takes_images_one_by_one_chooses_the_loader(tiny_dataset, options):
    batches = loaded(tiny_dataset, **options)
    assert isinstance(batches, KeyedBatches)
    assert isinstance(loaded(tiny_dataset), MemoryBatches)
    plain, _ = collect(loaded(tiny_dataset).epoch(0))
    images, _ = collect(batches.epoch(0))
    changed = (images != plain).flatten(2).any(2).sum()
    assert 16 < changed <= (48 if "erasing" in options else 64)
    assert torch.equal(collect(loaded(tiny_dataset, workers=2, **options).epoch(0))[0], images)
    assert torch.equal(collect(batches.epoch(0, 2))[0], images[2:])
    assert not torch.equal(collect(loaded(tiny_dataset, seed=1, **options).epoch(0))[0], images)
    message = "in_memory=true, but augment and erasing take images one by one"
    with pytest.raises(DataError, match=message):
        loaded(tiny_dataset, in_memory=True, **options)


def test_erasing_takes_a_rectangle_in_the_mean_colour(tiny_dataset):
    plain, _ = collect(loaded(tiny_dataset).epoch(0))
    images, _ = collect(loaded(tiny_dataset, erasing=1.0).epoch(0))
    inside = (images != plain).any(2).flatten(0, 1)
    lengths = assert_rectangles(inside)
    assert (lengths.min(1).values > 0).all()
    values = images.flatten(0, 1).permute(0, 2, 3, 1)[inside]
    assert (values == values[0]).all()
    assert values[0].abs().max() < 0.01


def test_what_is_done_to_an_image_goes_to_workers_that_are_spawned():
    step = Transforms(8, augment="rand", erasing=0.5, cutout=3, fill=(1, 2, 3)).training()
    pickle.loads(pickle.dumps(step))


def test_a_cutout_of_all_images_is_refused(tiny_dataset):
    for in_memory in (True, False):
        with pytest.raises(DataError, match="cutout=64 takes all of an image of 32 pixels"):
            loaded(tiny_dataset, cutout=64, in_memory=in_memory, workers=0)

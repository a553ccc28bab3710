"""From a dataset's name to batches: real files, errors by row, a seed that decides all."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Features, Image, Value, load_dataset
from PIL import Image as PILImage

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Drawing, Normalize, Share, Transforms, derive_seed
from gld_zoo.training.data.loaders import fits_in_memory, load_data
from gld_zoo.training.data.memory import MemoryBatches, MemoryEval, Split, decode
from gld_zoo.training.data.sources import ImageSource
from helpers import BUNDLED, FEATURES, write_dataset

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def encode(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return {"bytes": buffer.getvalue(), "path": None}


CPU = torch.device("cpu")
NORMALIZE = Normalize(MEAN, STD, CPU)


def bordered(split, padding):
    return Split(F.pad(split.images, (0, 0, *[padding] * 4)), split.labels)


def batches_of(split, **options):
    defaults = dict(batch_size=8, crop_padding=4, flip=True, seed=3, share=Share())
    options = {**defaults, **options}
    options = {"drawing": Drawing(options.pop("seed")), **options}
    return MemoryBatches(bordered(split, options["crop_padding"]), NORMALIZE, **options)


def decoded(source, size):
    transform = Transforms(size).fit()
    return decode(source.train, transform, size), decode(source.test, transform, size)


@pytest.fixture(scope="module")
def split():
    generator = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(256, (26, 12, 12, 3), dtype=torch.uint8, generator=generator),
        torch.arange(26),
    )


def test_bundled_images_are_real_balanced_and_small():
    source = ImageSource(str(BUNDLED))
    assert (source.train.image_column, source.train.label_column) == ("img", "fine_label")
    assert len(source.label_names) == 100
    train, test = decoded(source, 32)
    assert train.images.shape == (2000, 32, 32, 3)
    assert (train.labels.bincount() == 20).all()
    assert (test.labels.bincount() == 10).all()
    mean = train.images.float().mean((0, 1, 2)) / 255
    torch.testing.assert_close(
        mean, torch.tensor([0.5071, 0.4865, 0.4409]), atol=0.01, rtol=0
    )  # of all 50,000
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 6_000_000


def test_images_are_decoded_into_their_border(tiny_dataset):
    rows, transform = ImageSource(str(tiny_dataset)).test, Transforms(32).fit()
    assert torch.equal(
        decode(rows, transform, 32, padding=3).images,
        bordered(decode(rows, transform, 32), 3).images,
    )


def test_pixels_are_those_of_the_files(tiny_dataset):
    train, _ = decoded(ImageSource(str(tiny_dataset)), 32)
    rows = load_dataset(str(tiny_dataset))["train"]
    for row in (0, 63):
        assert np.array_equal(train.images[row].numpy(), np.array(rows[row]["img"].convert("RGB")))


def test_every_colour_mode_becomes_rgb(tmp_path, rows):
    colour = PILImage.open(io.BytesIO(rows["train"]["img"][0]["bytes"])).convert("RGB")
    grey = colour.convert("L")
    deep = PILImage.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # 16-bit grey
    palette = colour.convert("P")
    cases = [
        (grey, "PNG", grey),
        (deep, "PNG", grey),
        (grey.convert("LA"), "PNG", grey),
        (colour.convert("RGBA"), "PNG", colour),
        (palette, "PNG", palette.convert("RGB")),
        (grey.convert("1"), "PNG", grey.convert("1")),
    ]
    columns = dict(
        img=[encode(image, format) for image, format, _ in cases], fine_label=[0] * len(cases)
    )
    cmyk = dict(img=[encode(colour.convert("CMYK"), "JPEG")], fine_label=[0])
    folder = write_dataset(tmp_path, dict(train=columns, test=cmyk))
    train, test = decoded(ImageSource(str(folder)), 32)
    for row, (_, _, expected) in enumerate(cases):
        assert np.array_equal(train.images[row].numpy(), np.array(expected.convert("RGB"))), row
    difference = test.images[0].float() - torch.from_numpy(np.array(colour)).float()
    assert difference.abs().mean() < 8  # JPEG loses a little


def test_unreadable_image_is_named_by_row(tmp_path, rows):
    columns = {key: column[:20] for key, column in rows["train"].items()}
    broken = dict(
        columns,
        img=[*columns["img"][:13], {"bytes": b"no image", "path": None}, *columns["img"][14:]],
    )
    folder = write_dataset(tmp_path, dict(train=broken, test=columns))
    with pytest.raises(DataError, match=r"row 13 of split 'train'.*not a readable image"):
        decoded(ImageSource(str(folder)), 32)


def test_truncated_image_is_named_by_row(tmp_path, rows):
    columns = {key: column[:4] for key, column in rows["train"].items()}
    half = columns["img"][2]["bytes"]
    broken = dict(
        columns,
        img=[
            *columns["img"][:2],
            {"bytes": half[: len(half) // 2], "path": None},
            columns["img"][3],
        ],
    )
    folder = write_dataset(tmp_path, dict(train=columns, test=broken))
    with pytest.raises(DataError, match="row 2 of split 'test'"):
        decoded(ImageSource(str(folder)), 32)


def test_missing_label_is_named_by_row(tmp_path, rows):
    columns = {key: column[:6] for key, column in rows["train"].items()}
    broken = dict(columns, fine_label=[0, 1, None, 2, 3, -1])
    folder = write_dataset(tmp_path, dict(train=broken, test=columns), FEATURES)
    with pytest.raises(
        DataError, match=r"row 2 of split 'train'.*label None, outside 0 to 3 \(2 such rows\)"
    ):
        decoded(ImageSource(str(folder)), 32)


def test_integer_labels_are_taken_by_name(tmp_path, rows):
    columns = {key: column[:10] for key, column in rows["train"].items()}
    columns["fine_label"] = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    folder = write_dataset(
        tmp_path,
        dict(train=columns, test=columns),
        Features(img=Image(), fine_label=Value("int64")),
    )
    for name in (None, "fine_label"):  # which is a usual name
        source = ImageSource(str(folder), label_column=name)
        assert source.label_names == ["0", "1", "2", "3", "4"]


def test_image_folder_of_mixed_sizes_is_resized(tmp_path, rows):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, size in enumerate([(40, 60), (33, 33), (90, 48)]):
                image = PILImage.open(io.BytesIO(rows[split]["img"][i]["bytes"])).convert("RGB")
                image.resize(size).save(tmp_path / split / name / f"{i}.png")
    source = ImageSource(str(tmp_path))
    train, test = decoded(source, 24)
    assert source.label_names == ["cat", "dog"]
    assert train.images.shape == test.images.shape == (6, 24, 24, 3)
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_validation_stands_in_for_a_missing_test_split(tmp_path, rows):
    columns = {key: column[:4] for key, column in rows["train"].items()}
    folder = write_dataset(tmp_path, dict(train=columns, validation=columns))
    assert "'validation'" in ImageSource(str(folder)).test.where
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        ImageSource(str(folder), test_split="test")


def test_a_test_split_is_held_out_where_there_is_none(tmp_path, rows):
    folder = write_dataset(tmp_path, dict(train=rows["train"]))
    with pytest.raises(DataError, match=r"no split to measure on, only train; .* test_fraction"):
        ImageSource(str(folder))
    with pytest.raises(DataError, match="takes the place of test_split='train'"):
        ImageSource(str(folder), test_fraction=0.2, test_split="train")
    first, second = (ImageSource(str(folder), test_fraction=0.2) for _ in range(2))
    assert first.test.numbers.tolist() == second.test.numbers.tolist()
    labels = torch.tensor(rows["train"]["fine_label"])
    assert labels[first.test.numbers].bincount().tolist() == [
        round(0.2 * count) for count in labels.bincount().tolist()
    ]
    assert torch.equal(labels[first.test.numbers], first.test.labels())
    assert sorted([*first.train.numbers.tolist(), *first.test.numbers.tolist()]) == [*range(80)]
    for part in first.train.hold_out(0.5, 3):  # rows keep their number in the dataset
        assert torch.equal(labels[part.numbers], part.labels())


def test_classes_may_be_words_in_a_column_that_is_named(tmp_path, rows):
    words = ["dog", "cat", "bee", "dog", "cat"]
    features = Features(img=Image(), kind=Value("string"))
    images = {name: columns["img"][:5] for name, columns in rows.items()}
    columns = dict(train=dict(img=images["train"], kind=words))
    columns["test"] = dict(img=images["test"], kind=words[::-1])
    folder = write_dataset(tmp_path / "good", columns, features)
    with pytest.raises(DataError, match=r"name one by label_column; .* kind \(string\)"):
        ImageSource(str(folder))
    source = ImageSource(str(folder), label_column="kind")
    assert source.label_names == ["bee", "cat", "dog"]
    train, test = decoded(source, 32)
    assert train.labels.tolist() == [2, 1, 0, 2, 1]
    assert test.labels.tolist() == [1, 2, 0, 1, 2]
    item = source.train.table[1]
    assert source.train.example(1, item)[1] == 1
    columns["test"]["kind"] = ["cat", "cow", "cat", "cat", "cow"]
    other = str(write_dataset(tmp_path / "other", columns, features))
    with pytest.raises(
        DataError, match=r"split 'test' .* has 1 classes that split 'train' .*: cow"
    ):
        ImageSource(other, label_column="kind")
    with pytest.raises(DataError, match="of type string, whose classes a stream does not tell"):
        ImageSource(str(folder), label_column="kind", streaming=True)


def test_a_dataset_of_several_configs_wants_one_named(tmp_path, rows):
    for name, count in dict(small=4, large=8).items():
        part = {key: column[:count] for key, column in rows["train"].items()}
        write_dataset(tmp_path / name, dict(train=part, test=part))
    lines = []
    for name in ("small", "large"):
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [
            f"  - {{split: {split}, path: {name}/data/{split}-*}}" for split in ("train", "test")
        ]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    with pytest.raises(DataError, match=r"(?s)'large'.*name one by dataset_config"):
        ImageSource(str(tmp_path))
    assert len(ImageSource(str(tmp_path), config="large").train) == 8
    with pytest.raises(DataError, match="dataset_revision='main' is for a hub id"):
        ImageSource(str(tmp_path), config="large", revision="main")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(DataError, match="holds no image; the layout is train/CLASS/IMAGE"):
        ImageSource(str(tmp_path))


def test_what_does_not_fit_in_memory_is_read_when_needed():
    source, recipe = ImageSource(str(BUNDLED)), Recipe(student="gld_resnet20")
    assert fits_in_memory(source, recipe, 32, CPU)
    assert not fits_in_memory(source, recipe, 4000, CPU)
    assert not fits_in_memory(source, replace(recipe, crop="resized"), 32, CPU)
    assert not fits_in_memory(source, replace(recipe, in_memory=False), 32, CPU)
    with pytest.raises(DataError, match="134 GiB decoded at 4000x4000"):
        fits_in_memory(source, replace(recipe, in_memory=True), 4000, CPU)
    with pytest.raises(DataError, match="takes parts of the original images"):
        fits_in_memory(source, replace(recipe, in_memory=True, crop="resized"), 32, CPU)


def crop(split, index, top, left, flip):
    padded = torch.nn.functional.pad(split.images[index], (0, 0, 4, 4, 4, 4))
    window = padded[top : top + 12, left : left + 12].float() / 255
    window = window.flip(1) if flip else window
    return ((window - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def test_batches_are_crops_of_the_padded_images(split):
    for images, labels in batches_of(split).epoch(0):
        assert images.shape == (8, 3, 12, 12)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(
            images, labels.tolist(), strict=True
        ):  # the label is the image's index
            candidates = (
                crop(split, label, top, left, flip)
                for top in range(9)
                for left in range(9)
                for flip in (False, True)
            )
            assert any(torch.allclose(image, candidate, atol=1e-5) for candidate in candidates)


def test_every_offset_is_drawn_and_half_are_mirrored():
    """An image whose pixels tell their place: what a crop shows says which it is."""
    size, padding, count = 6, 2, 1000
    place = torch.arange(1, size**2 + 1, dtype=torch.uint8).reshape(size, size, 1)
    split = Split(place.expand(count, size, size, 3).clone(), torch.zeros(count, dtype=torch.int64))
    plain = Normalize((0, 0, 0), (1 / 255,) * 3, CPU)
    batches = MemoryBatches(
        bordered(split, padding),
        plain,
        batch_size=count,
        crop_padding=padding,
        flip=True,
        drawing=Drawing(0),
        share=Share(),
    )
    ((images, _),) = batches.epoch(0)
    centre = images[:, 0, 2, 2].round().long() - 1  # always of the image, and tells its offset
    tops, lefts = centre // size, centre % size
    mirrored = images[:, 0, 2, 3].round().long() - 1 < centre
    # mirrored, the pixel at column 2 is the one at column 3 of the crop
    for drawn in (tops, lefts - mirrored.long()):
        assert sorted(set(drawn.tolist())) == [*range(2 * padding + 1)]
        assert all(150 < times < 250 for times in drawn.bincount().tolist())
    assert 450 < mirrored.sum() < 550


def test_without_augmentation_batches_are_the_normalised_images(split):
    for images, labels in batches_of(split, crop_padding=0, flip=False).epoch(0):
        for image, label in zip(images, labels.tolist(), strict=True):
            torch.testing.assert_close(image, crop(split, label, 4, 4, False))


def test_an_epoch_shows_each_image_at_most_once_and_epochs_differ(split):
    batches = batches_of(split)
    orders = [
        torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist() for epoch in (0, 1, 0)
    ]
    assert len(batches) == 3
    assert len(set(orders[0])) == len(orders[0]) == 24
    assert orders[0] == orders[2] != orders[1]


def test_augmentation_belongs_to_the_image_not_to_its_place_in_the_batch(split):
    whole = {
        int(label): image
        for images, labels in batches_of(split).epoch(2)
        for image, label in zip(images, labels, strict=True)
    }
    halves = batches_of(split, batch_size=12).epoch(2)
    for images, labels in halves:
        for image, label in zip(images, labels.tolist(), strict=True):
            if label in whole:
                assert torch.equal(image, whole[label])


def test_processes_share_each_global_batch(split):
    whole = list(batches_of(split).epoch(1))
    parts = [list(batches_of(split, share=Share(rank, 2)).epoch(1)) for rank in range(2)]
    for (images, labels), first, second in zip(whole, *parts, strict=True):
        assert torch.equal(images[0::2], first[0])
        assert torch.equal(labels[1::2], second[1])
    with pytest.raises(DataError, match="batch_size=8 cannot be shared equally by 3"):
        Share(0, 3).batch_size(8)


def test_evaluation_neither_drops_nor_pads(split):
    for world_size in (1, 2, 3):
        seen = []
        for rank in range(world_size):
            share = Share(rank, world_size)
            for images, labels in MemoryEval(split, NORMALIZE, batch_size=8, share=share):
                torch.testing.assert_close(images[0], crop(split, int(labels[0]), 4, 4, False))
                seen += labels.tolist()
        assert sorted(seen) == list(range(26))


def test_seeds_differ_in_every_part():
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("in_memory", [True, False])
def test_views_come_again_in_another_order(tiny_dataset, in_memory):
    """The images of epoch V are those of epoch 0, of whoever asks, in the order of epoch V."""
    options = dict(student="gld_wrn16_1", dataset=str(tiny_dataset), batch_size=16, workers=0)
    options |= dict(in_memory=None) if in_memory else dict(in_memory=False)
    config = dict(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=(3, 32, 32), crop_mode="center")
    config |= dict(interpolation="bilinear", crop_pct=1.0)
    source = ImageSource(str(tiny_dataset))

    def load(**more):
        return load_data(source, Recipe(**options, **more), config, CPU, Share()).train

    def shown(batches, epoch):
        rows = torch.cat(list(batches.rows(epoch)))
        images = torch.cat([images for images, _ in batches.epoch(epoch)])
        return rows, images[rows.argsort()]

    fresh, again = load(seed=3), load(seed=3, views=2)
    for epoch in range(4):
        rows, images = shown(again, epoch)
        assert torch.equal(rows, shown(fresh, epoch)[0])  # the order does not come again
        assert torch.equal(images, shown(fresh, epoch % 2)[1])
    assert not torch.equal(shown(fresh, 2)[1], shown(fresh, 0)[1])
    other = load(seed=4, views=2, augment_seed=3)
    assert torch.equal(shown(other, 3)[1], shown(again, 1)[1])
    assert not torch.equal(shown(other, 3)[0], shown(again, 1)[0])
    wanted = torch.tensor([5, 3, 60])
    parts = list(again.of_view(1, wanted, 2))
    assert torch.equal(torch.cat([rows for rows, _ in parts]), wanted)
    assert torch.equal(torch.cat([images for _, images in parts]), shown(again, 3)[1][wanted])

"""Masks: what is read, what is refused, and that augmentation moves them with their pixels."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data import segmentation_rows as segmentation_data
from gld_zoo.training.data.batches import Normalize
from gld_zoo.training.data.keyed import KeyedExamples, stack, transform_under
from gld_zoo.training.data.segmentation_rows import (
    ListsToDevice,
    MeasuringTransform,
    SegmentationRows,
    SegmentationSource,
    collate_lists,
    training_transform,
)
from scenes import COLORS, encode, scene, segmentation_rows, write_segmentation

IMAGE, _, _, MASK = scene(0)


def source(folder, rows, num_classes=4, **options):
    folder = write_segmentation(folder, dict(train=rows, test=rows))
    return SegmentationSource(str(folder), num_classes, **options)


def first(found):
    return found.train.example(0, found.train.table[0])


def test_a_row_is_an_image_and_its_mask(tmp_path):
    image, mask = first(source(tmp_path, [(IMAGE, MASK)]))
    assert torch.equal(image, torch.from_numpy(IMAGE).permute(2, 0, 1))
    assert torch.equal(mask, torch.from_numpy(MASK).long())


def test_paths_of_images_are_those_below_the_folder(tmp_path, monkeypatch):
    folder = write_segmentation(tmp_path, dict(train=[(IMAGE, MASK)], test=[(IMAGE, MASK)]))
    PILImage.fromarray(IMAGE).save(folder / "scene.png")
    for path in (folder / "data").glob("*.parquet"):
        table = Dataset.from_parquet(str(path)).remove_columns("image")
        table.add_column("image", ["scene.png"]).to_parquet(str(path))
    monkeypatch.chdir(folder.parent)
    image, _ = first(SegmentationSource(str(folder), 4))
    assert torch.equal(image, torch.from_numpy(IMAGE).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:, :-1], r"row 0 of split 'train' .*: the image is 96x72 and its mask 95x72"),
        (np.full_like(MASK, 4), "mask with value 4, which is neither one of 4 classes"),
        (np.full_like(MASK, -1, np.int32), "mask with value -1, which is neither one of 4 classes"),
        (np.full_like(MASK, 0.7, np.float32), "mask of float32; it needs integers"),
        (np.stack([MASK] * 3, axis=2), "mask of 3 channels; it needs one"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(tmp_path, mask, message):
    with pytest.raises(DataError, match=message):
        first(source(tmp_path, [(IMAGE, mask)]))


def test_columns_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="mask_column='labels' is not a column"):
        source(tmp_path, [(IMAGE, MASK)], mask_column="labels")


def test_a_mask_that_ignores_all_is_taken(tmp_path):
    _, mask = first(source(tmp_path, [(IMAGE, np.full_like(MASK, 255))]))
    assert (mask == 255).all()


def grown(where):
    """Add a pixel on every side."""
    return F.max_pool2d(where[None].float(), 3, stride=1, padding=1)[0] > 0


@pytest.mark.parametrize("number", range(25))
def test_augmentation_keeps_classes_on_their_pixels(tmp_path_factory, number):
    image, _, categories, mask = scene(number, size=(120, 90))
    found = source(tmp_path_factory.mktemp("scene"), [(image, mask)])
    transform = training_transform(100, (0.0,) * 3)
    pixels, moved = transform_under(transform, first(found), number)
    assert pixels.shape == (3, 100, 100)
    assert moved.shape == (100, 100)
    assert set(moved.unique().tolist()) <= {0, 255, *(category + 1 for category in categories)}
    for category in set(categories):
        color = torch.tensor(COLORS[category])[:, None, None]
        near = ((pixels.int() - color).abs() < 60).all(0)
        inside = moved == category + 1
        assert near[~grown(~inside)].all()  # but for a rim that is blurred
        assert grown(inside)[near].all()
    if (moved == 255).any():  # only where the crop is larger than the image
        assert (pixels[:, moved == 255] == 0).all()


def test_augmentation_is_deeplabs():
    steps = training_transform(100, (0.0,) * 3).transforms
    assert [type(one) for one in steps] == [v2.ScaleJitter, v2.RandomCrop, v2.RandomHorizontalFlip]
    assert steps[2].p == 0.5


def test_augmentation_scales_by_half_to_two(tmp_path):
    """The object's pixels, against those at scale 1: crops can cut it, scales alone enlarge it."""
    mask = np.zeros((90, 120), np.uint8)
    mask[40:50, 55:65] = 1
    found = first(source(tmp_path, [(np.zeros((90, 120, 3), np.uint8), mask)]))
    transform = training_transform(120, (0.0,) * 3)
    counts = [(transform_under(transform, found, seed)[1] == 1).sum().item() for seed in range(60)]
    assert min(counts) <= 100 * 0.6**2
    assert 100 * 1.8**2 <= max(counts) <= 100 * 2.1**2


def test_a_measured_image_fits_and_its_mask_stays(tmp_path):
    image, mask = MeasuringTransform(48)(*first(source(tmp_path, [(IMAGE, MASK)])))
    assert image.shape == (3, 36, 48)
    assert mask.shape == (72, 96)


def test_an_image_that_cannot_be_brought_to_size_is_named(tmp_path):
    narrow = source(tmp_path, [(np.zeros((1, 600, 3), np.uint8), np.zeros((1, 600), np.uint8))])
    (found,) = KeyedExamples(narrow.train, MeasuringTransform(513), 0).__getitems__([(0, 0)])
    assert "row 0 of split 'train'" in str(found)
    assert "cannot be brought to size" in str(found)


def test_batches_are_normalised(tmp_path):
    rows = segmentation_rows([1, 2], size=(96, 72))
    found = source(tmp_path, rows)
    examples = [found.train.example(i, found.train.table[i]) for i in (0, 1)]
    to_device = ListsToDevice(Normalize((0.5,) * 3, (0.25,) * 3, torch.device("cpu")))
    images, masks = to_device(stack(examples))
    assert images.shape == (2, 3, 72, 96)
    expected = (torch.from_numpy(rows[0][0]).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(images[0], expected, atol=1e-5, rtol=0)
    assert type(masks) is torch.Tensor
    several, alone = to_device(collate_lists(examples))
    torch.testing.assert_close(several[1], images[1:])
    assert torch.equal(alone[1], masks[1])


def of_0_and_255(mask):
    return np.where(mask > 0, 255, 0).astype(np.uint8)


def test_masks_of_one_class_are_refused(tmp_path):
    found = source(tmp_path, [(IMAGE, of_0_and_255(MASK))] * 3, num_classes=2)
    for rows in (found.train, found.test):
        with pytest.raises(DataError, match=r"hold the value 0 alone beside 255.*values 0 and 1"):
            rows.check()


def test_masks_of_255_alone_are_refused(tmp_path):
    with pytest.raises(DataError, match="hold no value beside 255"):
        source(tmp_path, [(IMAGE, np.full_like(MASK, 255))]).train.check()


def test_masks_are_looked_at_until_two_classes_are_seen(tmp_path, monkeypatch):
    rows = [(IMAGE, np.zeros_like(MASK))] * 2 + [(IMAGE, MASK)] + [(IMAGE, np.zeros_like(MASK))] * 3
    found = source(tmp_path, rows).train
    read = []
    mask = SegmentationRows._mask
    monkeypatch.setattr(
        SegmentationRows, "_mask", lambda self, *given: read.append(given) or mask(self, *given)
    )
    assert found.check() is None
    assert len(read) == 3
    # of a large split not all are: that the rest holds one class too cannot be known
    monkeypatch.setattr(segmentation_data, "LOOKED_AT", 2)
    assert "of 6 masks 2 were looked at: the masks of split 'train'" in found.check()
    assert len(read) == 5


def test_a_row_without_a_mask_is_named(tmp_path):
    found = source(tmp_path, [(IMAGE, MASK)])
    item = dict(found.train.table[0], mask=None)
    with pytest.raises(DataError, match=r"row 0 of split 'train' .* has no mask"):
        found.train.example(0, item)


def tagged(array, turn):
    """Encode an image as stored, with EXIF's tag of how it is to be turned."""
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = turn
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, "PNG", exif=exif)
    return dict(bytes=file.getvalue(), path=None)


@pytest.mark.parametrize("turn", [1, 5, 6, 7, 8])
def test_a_mask_is_turned_with_its_image(tmp_path, turn):
    """Stored as the image is; one that lies as the image is seen stays."""
    found = source(tmp_path, [(IMAGE, MASK)]).train
    plain = encode(MASK)
    image, mask = found.example(0, dict(image=tagged(IMAGE, turn), mask=plain))
    seen = np.asarray(ImageOps.exif_transpose(Image().decode_example(tagged(MASK, turn))))
    assert torch.equal(mask, torch.tensor(seen).long())
    assert image.shape[-2:] == mask.shape
    for color in (0, 1, 2):
        near = ((image.int() - torch.tensor(COLORS[color])[:, None, None]).abs() < 60).all(0)
        assert torch.equal(near, mask == color + 1)
    for upright in (encode(seen), tagged(MASK, turn)):
        _, again = found.example(0, dict(image=tagged(IMAGE, turn), mask=upright))
        assert torch.equal(again, mask)


@pytest.mark.parametrize(("side", "turn"), [(72, 6), (72, 5), (96, 3), (96, 2), (96, 4)])
def test_a_mask_that_fits_before_and_after_the_turn_is_refused(tmp_path, side, turn):
    found = source(tmp_path, [(IMAGE, MASK)]).train
    image, mask = tagged(IMAGE[:, :side], turn), np.ascontiguousarray(MASK[:, :side])
    message = (
        rf"row 0 of split 'train' .*EXIF \(orientation {turn}\) turns the image, and at {side}"
    )
    with pytest.raises(DataError, match=message):
        found.example(0, dict(image=image, mask=encode(mask)))
    # with a tag of its own it lies as the image does
    _, turned = found.example(0, dict(image=image, mask=tagged(mask, turn)))
    assert len(turned.unique()) > 1

"""Boxes: what is read, what is refused, and that augmentation moves them with their objects."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import ExifTags
from PIL import Image as PILImage
from torchvision.transforms import v2

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.detection_rows import (
    BoxesToDevice,
    DetectionSource,
    collate,
    measuring_transform,
    training_transform,
)
from gld_zoo.training.data.keyed import transform_under
from scenes import COLORS, detection_rows, encode, scene, write_detection

IMAGE, BOXES, CATEGORIES, _ = scene(0)


TWO = dict(bbox=BOXES, category=[0, 1])


def source(folder, rows, **options):
    return DetectionSource(str(write_detection(folder, dict(train=rows, test=rows))), **options)


def first(found):
    return found.train.example(0, found.train.table[0])


def test_a_row_is_torchvisions_target(tmp_path):
    found = source(tmp_path, [(IMAGE, BOXES, CATEGORIES, [0, 1])])
    image, target = first(found)
    assert torch.equal(image, torch.from_numpy(IMAGE).permute(2, 0, 1))
    assert target["boxes"].tolist() == BOXES
    assert target["labels"].tolist() == [category + 1 for category in CATEGORIES]
    assert target["iscrowd"].tolist() == [0, 1]
    assert found.label_names == ["red", "green", "blue"]
    assert found.train.check() == 2


def test_corner_with_width_and_height(tmp_path):
    boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]
    found = source(tmp_path, [(IMAGE, boxes, CATEGORIES, [0, 0])], bbox_format="xywh")
    assert first(found)[1]["boxes"].tolist() == BOXES


def test_plain_integers_are_numbered(tmp_path):
    features = Features(
        picture=Image(),
        things=dict(bbox=List(List(Value("float32"))), category=List(Value("int64"))),
    )
    columns = dict(picture=[encode(IMAGE)], things=[dict(bbox=BOXES, category=[0, 4])])
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    found = DetectionSource(str(tmp_path), objects_column="things")
    assert found.label_names == ["0", "1", "2", "3", "4"]
    assert first(found)[1]["iscrowd"].tolist() == [0, 0]


def write(folder, features, objects):
    """Write rows of one image, and these objects, as both splits."""
    columns = dict(image=[encode(IMAGE)] * len(objects), objects=objects)
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(folder)


def test_paths_of_images_are_those_below_the_folder(tmp_path, monkeypatch):
    kinds = dict(bbox=List(List(Value("float32"))), category=List(Value("int64")))
    folder = Path(write(tmp_path, Features(image=Image(), objects=kinds), [TWO]))
    PILImage.fromarray(IMAGE).save(folder / "scene.png")
    for path in (folder / "data").glob("*.parquet"):
        columns = dict(image=["scene.png"], objects=[TWO])
        features = Features(image=Value("string"), objects=kinds)
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    monkeypatch.chdir(folder.parent)
    found = DetectionSource(str(folder))
    assert torch.equal(first(found)[0], torch.from_numpy(IMAGE).permute(2, 0, 1))


def test_crowds_as_coco_has_them_and_lists_that_are_null(tmp_path):
    kinds = dict(
        bbox=List(List(Value("float32"))),
        category=List(Value("int64")),
        iscrowd=List(Value("int8")),
    )
    rows = [
        dict(bbox=BOXES, category=[0, 1], iscrowd=[0, 1]),
        dict(bbox=None, category=None, iscrowd=None),
    ]
    found = DetectionSource(write(tmp_path, Features(image=Image(), objects=kinds), rows))
    assert found.train.check() == 2
    assert first(found)[1]["iscrowd"].tolist() == [0, 1]
    assert found.train.example(1, found.train.table[1])[1]["boxes"].shape == (0, 4)


def test_categories_that_are_words_are_refused(tmp_path):
    kinds = dict(bbox=List(List(Value("float32"))), category=List(Value("string")))
    rows = [dict(bbox=BOXES, category=["cat", "dog"])]
    folder = write(tmp_path, Features(image=Image(), objects=kinds), rows)
    with pytest.raises(DataError, match="categories of type string; they must be class indices"):
        DetectionSource(folder)


def test_a_list_of_objects_and_none_at_all(tmp_path):
    each = dict(bbox=List(Value("float32")), category=Value("int64"), difficult=Value("bool"))
    features = Features(image=Image(), objects=List(each))
    objects = [
        dict(bbox=box, category=category, difficult=flag)
        for box, category, flag in zip(BOXES, CATEGORIES, (True, None), strict=True)
    ]
    found = DetectionSource(write(tmp_path, features, [objects, None, []]))
    assert found.train.check() == 2
    assert first(found)[1]["boxes"].tolist() == BOXES
    assert first(found)[1]["iscrowd"].tolist() == [1, 0]
    for row in (1, 2):
        _, target = found.train.example(row, found.train.table[row])
        assert target["boxes"].shape == (0, 4)


@pytest.mark.parametrize("boxes", [[], [[5.0, 5.0, 5.0, 20.0]], [[200.0, 5.0, 220.0, 20.0]]])
def test_no_box_one_without_area_and_one_outside_leave_an_image_without(tmp_path, boxes):
    found = source(tmp_path, [(IMAGE, boxes, [1] * len(boxes), [0] * len(boxes))])
    for transform in (training_transform(64, [0.5] * 3), measuring_transform()):
        _, target = transform_under(transform, first(found), 0)
        assert target["boxes"].shape == (0, 4)
        assert len(target["labels"]) == len(target["iscrowd"]) == 0


def test_a_box_partly_outside_is_cut(tmp_path):
    found = source(tmp_path, [(IMAGE, [[-10.0, 60.0, 30.0, 90.0]], [1], [0])])
    _, target = measuring_transform()(*first(found))
    assert target["boxes"].tolist() == [[0, 60, 30, 72]]


@pytest.mark.parametrize(
    ("boxes", "categories", "message"),
    [
        (
            [[0.0, 0.0, 9.0, 9.0]],
            [-1],
            r"row 1 of split 'train' .* category (-1|None), outside 0 to 2",
        ),
        ([[0.0, 0.0, 9.0]], [1], r"row 1 of .* each needs four"),
        ([[0.0, 0.0, 9.0, 9.0]], [1, 2], r"row 1 of .* 1 boxes of .* for 2 categories"),
        ([[0.0, 0.0, float("nan"), 9.0]], [1], r"row 1 of .* not finite"),
        ([[0.0, None, 9.0, 9.0]], [1], r"row 1 of .* not finite"),
        ([[50.0, 40.0, 30.0, 20.0]], [1], r"row 1 of .* negative .* as xyxy; set bbox_format"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(tmp_path, boxes, categories, message):
    rows = [(IMAGE, BOXES, CATEGORIES, [0, 0]), (IMAGE, boxes, categories, [0] * len(boxes))]
    with pytest.raises(DataError, match=message):
        source(tmp_path, rows).train.check()


def test_columns_that_are_not_there_are_named(tmp_path):
    rows = [(IMAGE, BOXES, CATEGORIES, [0, 0])]
    with pytest.raises(DataError, match="objects_column='boxes' is not a column of"):
        source(tmp_path / "a", rows, objects_column="boxes")
    with pytest.raises(DataError, match=r"column .image. of .* has no bbox and no category"):
        source(tmp_path / "b", rows, objects_column="image")


@pytest.mark.parametrize("number", range(40))
def test_augmentation_keeps_an_objects_pixels_inside_its_box(tmp_path_factory, number):
    """The rectangle's pixels, found by colour, lie in the box, and fill it."""
    image, boxes, categories, _ = scene(number, size=(120, 90), objects=1)
    folder = tmp_path_factory.mktemp("scene")
    found = source(folder, [(image, boxes, categories, [0])])
    transform = training_transform(100, [0.0] * 3)
    # colours must stay to be found
    transform.transforms = [
        step for step in transform.transforms if not isinstance(step, v2.RandomPhotometricDistort)
    ]
    pixels, target = transform_under(transform, first(found), number)
    assert pixels.shape == (3, 100, 100)
    color = torch.tensor(COLORS[categories[0]])[:, None, None]
    near = ((pixels.int() - color).abs() < 60).all(0)
    if not len(target["boxes"]):
        assert near.sum() < 40  # no more than a rim of what was cropped away
        return
    (x1, y1, x2, y2), (label,) = target["boxes"][0].tolist(), target["labels"].tolist()
    assert label == categories[0] + 1
    rows, columns = near.nonzero().T
    assert rows.min() >= np.floor(y1) - 1
    assert rows.max() <= np.ceil(y2)
    assert columns.min() >= np.floor(x1) - 1
    assert columns.max() <= np.ceil(x2)
    assert near.sum() >= 0.7 * (x2 - x1) * (y2 - y1)


def test_augmentation_is_ssds():
    """Colours, zoom out to four times the side, a crop of an overlap, a flip: the paper's 3.6."""
    steps = {type(step): step for step in training_transform(300, [0.5] * 3).transforms}
    assert list(steps)[2:] == [
        v2.RandomPhotometricDistort,
        v2.RandomZoomOut,
        v2.RandomIoUCrop,
        v2.RandomHorizontalFlip,
        v2.Resize,
    ]
    assert list(steps[v2.RandomZoomOut].side_range) == [1.0, 4.0]
    assert steps[v2.RandomZoomOut].p == 0.5
    assert steps[v2.RandomIoUCrop].options == [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert steps[v2.RandomHorizontalFlip].p == 0.5
    assert steps[v2.Resize].antialias is False  # as the model resizes


def test_the_same_seed_gives_the_same_example(tmp_path):
    found = source(tmp_path, detection_rows([3]))
    transform = training_transform(80, [0.4] * 3)
    (a, one), (b, two) = (transform_under(transform, first(found), 7) for _ in range(2))
    other, _ = transform_under(transform, first(found), 8)
    assert torch.equal(a, b)
    assert torch.equal(one["boxes"], two["boxes"])
    assert not torch.equal(a, other)


def test_a_batch_is_lists_of_plain_tensors(tmp_path):
    found = source(tmp_path, detection_rows([1, 2]))
    examples = [found.train.example(i, found.train.table[i]) for i in (0, 1)]
    images, targets = BoxesToDevice(torch.device("cpu"))(collate(examples))
    assert [type(image) for image in images] == [torch.Tensor] * 2
    assert images[0].dtype == torch.float32
    assert images[0].max() <= 1
    assert type(targets[1]["boxes"]) is torch.Tensor


@pytest.mark.parametrize("bbox_format", ["xyxy", "xywh"])
@pytest.mark.parametrize("box", [[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.01, 1.0], [0.5, 0.5, 0.2, 0.2]])
def test_boxes_that_are_fractions_are_refused(tmp_path, box, bbox_format):
    """The last one is a centre with width and height."""
    found = source(tmp_path, [(IMAGE, [box], [1], [0])] * 2, bbox_format=bbox_format)
    for rows in (found.train, found.test):
        with pytest.raises(DataError, match="look like fractions: multiply them by the width and"):
            rows.check()


def test_small_boxes_beside_others_are_taken(tmp_path):
    small = (IMAGE, [[0.0, 0.0, 1.0, 1.0]], [1], [0])
    found = source(tmp_path, [small, (IMAGE, BOXES, CATEGORIES, [0, 0])])
    assert found.train.check() == 3


@pytest.mark.parametrize("boxes", [[], [[0.0] * 4], [[5.0, 5.0, 5.0, 20.0]]])
def test_a_split_without_any_object_is_refused(tmp_path, boxes):
    found = source(tmp_path, [(IMAGE, boxes, [1] * len(boxes), [0] * len(boxes))] * 2)
    message = rf"split 'train' of .* has {2 * len(boxes)} boxes in column 'objects', none of them"
    with pytest.raises(DataError, match=message):
        found.train.check()


def test_boxes_are_those_of_the_image_as_it_is_seen(tmp_path):
    """Where EXIF turns it, boxes that do not lie inside then must be of the image as stored."""
    found = source(tmp_path, [(IMAGE, BOXES, CATEGORIES, [0, 0])]).train
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    PILImage.fromarray(IMAGE).save(file, "JPEG", exif=exif)  # 96x72, seen as 72x96
    image = dict(bytes=file.getvalue(), path=None)

    def example(box):
        return found.example(0, dict(image=image, objects=dict(bbox=[box], category=[1])))

    pixels, target = example([10.0, 60.0, 72.5, 96.5])
    assert pixels.shape == (3, 96, 72)
    assert target["boxes"].tolist() == [[10, 60, 72.5, 96.5]]
    message = (
        r"row 0 .*EXIF \(orientation 6\) turns the image, which is 72x96 then, and the box .*80"
    )
    with pytest.raises(DataError, match=message):
        example([60.0, 10.0, 80.0, 30.0])

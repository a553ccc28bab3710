"""The key of a teacher's store: what decides a row is part of it, and what does not is not."""

from dataclasses import replace

import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Features, Image

from gld_zoo.hub import save_pretrained
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.tasks.relations import task_of
from gld_zoo.training.teaching.answers import choose_answers
from gld_zoo.training.teaching.key import content_sha256
from gld_zoo.training.teaching.opening import describe_store
from helpers import FEATURES, write_dataset


@pytest.fixture(scope="module")
def recipe(tiny_dataset, teacher_run):
    return Recipe(
        student="gld_wrn16_1",
        teacher=f"local-dir:{teacher_run}/last",
        dataset=str(tiny_dataset),
        batch_size=16,
        views=2,
        teacher_store="auto",
        workers=0,
    )


def key_of(recipe):
    """The key that a run of a recipe would have."""
    task = task_of(recipe, Accelerator(cpu=True))
    run = task.taught_by.run
    classes = len(task.source.label_names)
    answers = choose_answers(task.teacher, recipe.grid, classes, recipe.store_dtype)
    return describe_store(run, answers)["key"]


DECIDING = [
    dict(crop_padding=2),
    dict(crop="resized"),
    dict(crop="resized", crop_scale=[0.5, 1.0]),
    dict(flip=False),
    dict(augment="rand"),
    dict(cutout=8),
    dict(erasing=0.2),
    dict(in_memory=False),
    dict(image_size=24),
    dict(teacher_size=24),
    dict(teacher_head="fit"),
    dict(teacher_head="fit", crop_pct=0.5),
    dict(teacher_head="none"),
    dict(grid=4),
    dict(grid=[2, 4]),
    dict(views=4),
    dict(seed=1),
    dict(augment_seed=5),
    dict(val_fraction=0.25),
    dict(test_fraction=0.25),
    dict(store_dtype="float32"),
    dict(train_split="test"),
    dict(teacher="gld_wrn16_2.ce_cifar100", teacher_head="none"),
]


@pytest.mark.slow
def test_what_decides_a_row_decides_the_key(recipe):
    keys = [key_of(recipe), *(key_of(replace(recipe, **changes)) for changes in DECIDING)]
    repeated = [DECIDING[i - 1] for i, key in enumerate(keys) if keys.index(key) != i]
    assert not repeated


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_size=8),
        dict(lr=0.5, epochs=7),
        dict(alpha=0.1),
        dict(student="gld_wrn16_2"),
        dict(workers=1),
        dict(eval_batch_size=7),
        dict(seed=1, augment_seed=0),
        dict(crop_pct=0.5),
    ],
)
def test_what_decides_none_does_not(recipe, changes):
    assert key_of(replace(recipe, **changes)) == key_of(recipe)


def test_the_images_and_their_order_decide_and_with_a_fitted_head_their_classes(
    recipe, rows, tmp_path
):
    def key_with(name, columns, features=FEATURES, **changes):
        folder = write_dataset(tmp_path / name, columns, features)
        return key_of(replace(recipe, dataset=str(folder), **changes))

    def altered(name, **columns):
        train = dict(rows["train"], **columns)
        return key_with(name, dict(rows, train=train), teacher_head="fit")

    images, labels = rows["train"]["img"], rows["train"]["fine_label"]
    first = dict(images[0], bytes=images[0]["bytes"] + b"\0")  # one byte behind the picture
    keys = {
        key_with("same", rows, teacher_head="fit"),
        altered("byte", img=[first, *images[1:]]),
        altered("order", img=images[::-1]),
        altered("labels", fine_label=labels[::-1]),
    }
    assert len(keys) == 4
    assert key_with("again", rows, teacher_head="fit") in keys


def test_the_same_weights_in_other_layers_are_another_teacher(recipe, tmp_path):
    """As ports of one network with other paddings are."""
    state = timm.create_model("efficientnet_lite0", num_classes=4).state_dict()
    keys = set()
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        model = timm.create_model(name, num_classes=4)
        model.load_state_dict(state)
        folder = save_pretrained(model, tmp_path / name)
        keys.add(key_of(replace(recipe, teacher=f"local-dir:{folder}", image_size=64)))
    assert len(keys) == 2


def test_classes_in_another_order_are_other_rows(recipe, rows, tmp_path):
    names = FEATURES["fine_label"].names[::-1]
    features = Features(img=Image(), fine_label=ClassLabel(names=names))
    folder = write_dataset(tmp_path / "data", rows, features)
    assert key_of(replace(recipe, dataset=str(folder))) != key_of(recipe)


def test_files_of_a_folder_are_hashed_as_the_same_bytes_in_a_table(tmp_path, rows):
    for number, (image, label) in enumerate(
        zip(rows["train"]["img"], rows["train"]["fine_label"], strict=True)
    ):
        place = tmp_path / "photos" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(image["bytes"])
    source = ImageSource(str(tmp_path / "photos"), test_fraction=0.2)
    hashes = [content_sha256(part) for part in (source.train, source.train, source.test)]
    assert hashes[0] == hashes[1] != hashes[2]
    chosen = source.train.select(torch.arange(5))
    assert content_sha256(chosen) != hashes[0]

"""A dataset is read as its owner laid it out: each class has a colour, and its pixels show it."""

import io
import os

import datasets
import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from folders import COLORS, THREE, picture, put, tidy
from gld_zoo.images import image_extensions
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import Transforms
from gld_zoo.training.data.image_folder import sort_names
from gld_zoo.training.data.memory import decode
from gld_zoo.training.data.sources import ImageSource, facts
from gld_zoo.training.tasks.labels import check_classes


def assert_read(source, counts, train=True):
    """Assert the names of the classes, their counts in both splits, and their pixels."""
    assert source.label_names == list(counts)
    for rows, place in ((source.train, 0), (source.test, 1)):
        split = decode(rows, Transforms(8).fit(), 8)
        found = split.labels.bincount(minlength=len(counts)).tolist()
        assert found == [pair[place] for pair in counts.values()]
        for pixels, label in zip(split.images, split.labels.tolist(), strict=True):
            wanted = torch.tensor(COLORS[source.label_names[label].split("#")[0]])
            assert (pixels[4, 4].int() - wanted).abs().max() < 25  # JPEG's loss


def encoded(name, number=0):
    file = io.BytesIO()
    picture(name, number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(folder, splits, features):
    for name, columns in splits.items():
        path = folder / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features[name]).to_parquet(str(path))
    return str(folder)


def columns_of(words, names):
    return dict(image=[encoded(word, i) for i, word in enumerate(words)], label=names)


def test_a_class_may_be_named_as_a_split(tmp_path):
    tidy(tmp_path, ("bus", "car", "test", "train"))
    assert_read(ImageSource(str(tmp_path)), dict(bus=(4, 2), car=(4, 2), test=(4, 2), train=(4, 2)))
    for name in ("bus", "car", "train"):
        put(tmp_path / "flat" / name, name, 10)
    source = ImageSource(str(tmp_path / "flat"), test_fraction=0.2)
    assert_read(source, dict(bus=(8, 2), car=(8, 2), train=(8, 2)))


def test_names_of_files_decide_nothing(tmp_path):
    for name in THREE:
        put(tmp_path / name, name, 8)
        for number, word in enumerate(("training shot 3", "test-1", "val 7.2", "eval")):
            picture(name, number).save(tmp_path / name / f"{word}.png")
    source = ImageSource(str(tmp_path), test_fraction=0.25)
    assert_read(source, dict.fromkeys(THREE, (9, 3)))


@pytest.mark.parametrize("names", [("Train", "VAL"), ("training", "Valid"), ("TRAINING", "dev")])
def test_splits_are_known_by_their_names_in_any_case(tmp_path, names):
    for split, count in zip(names, (3, 2), strict=True):
        for name in THREE:
            put(tmp_path / split / name, name, count)
    source = ImageSource(str(tmp_path))
    assert_read(source, dict.fromkeys(THREE, (3, 2)))
    assert source.test_split == "validation"


def test_the_class_is_the_folder_under_the_split_and_what_is_below_is_walked(tmp_path):
    tidy(tmp_path)
    for name in THREE:
        put(tmp_path / "train" / name / "x", name, 2)
        put(tmp_path / "train" / name / "y" / "z", name, 1)
    assert_read(ImageSource(str(tmp_path)), dict.fromkeys(THREE, (7, 2)))


def test_links_are_followed_and_loops_named(tmp_path):
    tidy(tmp_path / "data", ("ant", "bee"))
    put(tmp_path / "elsewhere", "cat", 3)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cat").symlink_to(tmp_path / "elsewhere")
    source = ImageSource(str(tmp_path / "data"))
    assert_read(source, dict(ant=(4, 2), bee=(4, 2), cat=(3, 3)))
    (tmp_path / "data" / "train" / "ant" / "again").symlink_to(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=r"ant/again is a link to a folder that it lies in"):
        ImageSource(str(tmp_path / "data"))
    (tmp_path / "data" / "train" / "ant" / "again").unlink()
    (tmp_path / "data" / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png leads to no file"):
        ImageSource(str(tmp_path / "data"))


def test_system_folders_and_files_are_passed_over_and_told(tmp_path):
    tidy(tmp_path)
    for name in ("@eaDir", ".ipynb_checkpoints", "__MACOSX", ".git"):
        put(tmp_path / "train" / name, "ant")
    put(tmp_path / "train" / "ant" / "@eaDir", "bee")
    for name in ("._1.png", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / "train" / "bee" / name).write_bytes(b"x")
    source = ImageSource(str(tmp_path))
    assert_read(source, dict.fromkeys(THREE, (4, 2)))
    assert source.passed_over == {"system folder": 5, "system file": 4}
    assert facts(source) == ["passed over: 4 x system file, 5 x system folder"]


def test_what_is_no_image_is_passed_over_and_counted(tmp_path):
    tidy(tmp_path)
    for name in THREE:
        (tmp_path / "train" / name / "0.txt").write_text("about 0")
    (tmp_path / "test" / "ant" / "0.XML").write_text("<box/>")
    (tmp_path / "train" / "bee" / "LICENSE").write_text("free")
    (tmp_path / "notes.md").write_text("mine")
    source = ImageSource(str(tmp_path))
    assert_read(source, dict.fromkeys(THREE, (4, 2)))
    assert source.passed_over == {
        "no image (.txt)": 3,
        "no image (.xml)": 1,
        "no image (no ending)": 1,
        "no image (.md)": 1,
    }


def test_an_image_outside_the_classes_is_named(tmp_path):
    tidy(tmp_path / "a")
    picture("ant").save(tmp_path / "a" / "train" / "stray.png")
    with pytest.raises(DataError, match=r"train/stray\.png lies beside the class folders"):
        ImageSource(str(tmp_path / "a"))
    for name in THREE:
        put(tmp_path / "b" / "train" / name, name)
    put(tmp_path / "b" / "test", "ant")
    with pytest.raises(DataError, match=r"test/0\.png lies beside .* \(such images: 2\)"):
        ImageSource(str(tmp_path / "b"))
    put(tmp_path / "c" / "train", "ant")
    put(tmp_path / "c" / "test", "bee")
    with pytest.raises(DataError, match=r"train/0\.png lies beside the class folders"):
        ImageSource(str(tmp_path / "c"))


def test_one_class_or_one_level_more_is_named(tmp_path):
    tidy(tmp_path / "one", ("ant",))
    with pytest.raises(DataError, match="has one class alone, 'ant', and a classifier needs two"):
        ImageSource(str(tmp_path / "one"))
    tidy(tmp_path / "deep" / "photos")
    with pytest.raises(DataError, match=r"holds test, train: give .*deep/photos as the dataset"):
        ImageSource(str(tmp_path / "deep"))
    features = Features(image=Image(), label=ClassLabel(names=["ant"]))
    columns = columns_of(["ant", "ant"], [0, 0])
    folder = write_parquet(
        tmp_path / "hub", dict(train=columns, test=columns), dict(train=features, test=features)
    )
    with pytest.raises(DataError, match=r"has one class alone \(ant\)"):
        ImageSource(folder)


def test_classes_of_all_splits_are_joined_by_name(tmp_path):
    features = dict(
        train=Features(image=Image(), label=ClassLabel(names=["ant", "bee", "cat"])),
        test=Features(image=Image(), label=ClassLabel(names=["bee", "cat", "dog", "ant"])),
    )
    splits = dict(
        train=columns_of(["ant", "bee", "cat"], [0, 1, 2]),
        test=columns_of(["bee", "cat", "ant", "cat"], [0, 1, 3, 1]),
    )
    source = ImageSource(write_parquet(tmp_path / "good", splits, features))
    assert_read(source, dict(ant=(1, 1), bee=(1, 1), cat=(1, 2)))
    splits["test"] = columns_of(["bee", "dog"], [0, 2])
    with pytest.raises(DataError, match=r"has 1 classes that split 'train' .* has not: dog"):
        ImageSource(write_parquet(tmp_path / "bad", splits, features))
    for name in THREE:
        put(tmp_path / "folder" / "train" / name, name)
    put(tmp_path / "folder" / "test" / "dog", "dog")
    with pytest.raises(DataError, match=r"has not: dog"):
        ImageSource(str(tmp_path / "folder"))


def test_a_class_without_a_training_image_is_an_error_unless_it_is_allowed(tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=["ant", "bee", "cat"]))
    splits = dict(train=columns_of(["ant", "bee"], [0, 1]), test=columns_of(["ant", "cat"], [0, 2]))
    source = ImageSource(write_parquet(tmp_path, splits, dict(train=features, test=features)))
    with pytest.raises(DataError, match=r"no image of 1 of its 3 classes \(cat\)"):
        check_classes(source, allowed=False)
    assert check_classes(source, allowed=True) == ["cat"]
    assert facts(source, ["cat"]) == ["no training image of cat"]


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        ("int64", [20210101, 20210204, 20220101], ["20210101", "20210204", "20220101"]),
        ("int64", [-1, 7, 30], ["-1", "7", "30"]),
        ("string", ["10", "2", "1"], ["1", "2", "10"]),
        ("string", ["b", "a", "10"], ["10", "a", "b"]),
        ("bool", [True, False], ["False", "True"]),
    ],
)
def test_values_that_occur_are_the_classes_under_their_own_names(tmp_path, kind, values, names):
    features = Features(image=Image(), label=Value(kind))
    colors = dict(zip(map(str, values), ("ant", "bee", "cat"), strict=False))
    columns = columns_of([colors[str(value)] for value in values] * 2, values * 2)
    splits = dict(train=columns, test=columns)
    source = ImageSource(write_parquet(tmp_path, splits, dict(train=features, test=features)))
    assert source.label_names == names
    for rows in (source.train, source.test):
        split = decode(rows, Transforms(8).fit(), 8)
        for pixels, label in zip(split.images, split.labels.tolist(), strict=True):
            assert tuple(pixels[4, 4].tolist()) == COLORS[colors[names[label]]]
        item = rows.table[1]
        label = rows.example(1, item)[1]
        assert type(label) is int
        assert label == split.labels[1]


def test_of_several_columns_the_usual_names_are_taken_and_told(tmp_path):
    features = Features(
        thumb=Image(),
        image=Image(),
        split=ClassLabel(names=["train"]),
        label=ClassLabel(names=["ant", "bee"]),
    )
    columns = dict(
        thumb=[encoded("dog")] * 2,
        image=[encoded("ant"), encoded("bee")],
        split=[0, 0],
        label=[0, 1],
    )
    splits = dict(train=columns, test=columns)
    source = ImageSource(write_parquet(tmp_path, splits, dict.fromkeys(splits, features)))
    assert_read(source, dict(ant=(1, 1), bee=(1, 1)))
    assert facts(source) == [
        "the images are column 'image', the usual name among thumb, image (--image_column names "
        "another); the labels are column 'label', the usual name among split, label "
        "(--label_column names another)"
    ]
    renamed = dict(image="large", label="kind")
    other = {renamed.get(name, name): values for name, values in columns.items()}
    kinds = Features({renamed.get(name, name): kind for name, kind in features.items()})
    splits = dict(train=other, test=other)
    folder = write_parquet(tmp_path / "b", splits, dict.fromkeys(splits, kinds))
    with pytest.raises(DataError, match="several columns of type Image: thumb, large; name one"):
        ImageSource(folder)
    with pytest.raises(DataError, match="several columns of type ClassLabel: split, kind; name"):
        ImageSource(folder, image_column="large")
    source = ImageSource(folder, image_column="large", label_column="kind")
    assert_read(source, dict(ant=(1, 1), bee=(1, 1)))


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_written_by_pandas_is_taken_as_images(tmp_path, kind):
    for split in ("train", "test"):
        images = [encoded(name) for name in THREE]
        if kind == "bytes":
            images = [image["bytes"] for image in images]
        frame = pandas.DataFrame(dict(image=images, label=list(THREE)))
        (tmp_path / "data").mkdir(exist_ok=True)
        frame.to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    assert_read(ImageSource(str(tmp_path)), dict.fromkeys(THREE, (1, 1)))


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=list(THREE)))
    split = Dataset.from_dict(columns_of(THREE, [0, 1, 2]), features=features)
    DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "both"))
    assert_read(ImageSource(str(tmp_path / "both")), dict.fromkeys(THREE, (1, 1)))


def test_a_table_of_paths_is_read(tmp_path):
    for split in ("train", "test"):
        lines = ["path,label"]
        for name in THREE:
            put(tmp_path / "pictures" / split, name, 1, ending=f"-{name}.png")
            lines.append(f"pictures/{split}/0-{name}.png,{name}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    assert_read(ImageSource(str(tmp_path)), dict.fromkeys(THREE, (1, 1)))


def test_metadata_beside_images_is_read(tmp_path):
    for split in ("train", "test"):
        lines = ["file_name,label"]
        for name in THREE:
            put(tmp_path / split, name, 1, ending=f"-{name}.png")
            lines.append(f"0-{name}.png,{name}")
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert_read(ImageSource(str(tmp_path)), dict.fromkeys(THREE, (1, 1)))


def test_only_splits_are_read_where_there_are_some(tmp_path):
    tidy(tmp_path)
    for name in ("train_old", "test_results", "plots"):
        for kind in THREE:
            put(tmp_path / name / kind, "dog")
    picture("dog").save(tmp_path / "sample.png")
    source = ImageSource(str(tmp_path))
    assert_read(source, dict.fromkeys(THREE, (4, 2)))
    assert source.passed_over == {
        "folder beside the splits: plots": 1,
        "folder beside the splits: test_results": 1,
        "folder beside the splits: train_old": 1,
        "image beside the splits": 1,
    }


def test_names_may_hold_any_letter_and_endings_any_case(tmp_path):
    names = ["ant# [1] 100%", "bee (zwölf)", "cat 猫*?", "dog;'\"&"]
    colors = dict(zip(names, ("ant", "bee", "cat", "dog"), strict=True))
    for split in ("train", "test"):
        for name in names:
            put(tmp_path / split / name, colors[name], 1, ending=" [a] #1 50%.PNG")
            put(tmp_path / split / name, colors[name], 1, ending=" ü.JPeG")
    source = ImageSource(str(tmp_path))
    assert source.label_names == sorted(names)
    split = decode(source.train, Transforms(8).fit(), 8)
    assert split.labels.bincount().tolist() == [2, 2, 2, 2]
    for pixels, label in zip(split.images, split.labels.tolist(), strict=True):
        wanted = torch.tensor(COLORS[colors[source.label_names[label]]])
        assert (pixels[4, 4].int() - wanted).abs().max() < 25


def test_folders_of_numbers_are_in_the_order_of_numbers(tmp_path):
    for split in ("train", "test"):
        for name, color in zip(("1", "2", "10"), THREE, strict=True):
            put(tmp_path / split / name, color)
    assert ImageSource(str(tmp_path)).label_names == ["1", "2", "10"]
    assert sort_names(["10", "9", "09", "b"]) == ["09", "10", "9", "b"]


def test_what_pillow_opens_is_an_image(tmp_path):
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= image_extensions()
    assert not image_extensions() & {".pdf", ".eps", ".h5", ".mpg", ".txt", ".wmf"}
    if ".avif" in image_extensions():
        for split in ("train", "test"):
            for name in THREE:
                put(tmp_path / split / name, name, 1, ending=".avif")
        assert_read(ImageSource(str(tmp_path)), dict.fromkeys(THREE, (1, 1)))


def test_two_folders_of_one_split_are_an_error(tmp_path):
    tidy(tmp_path)
    put(tmp_path / "Training" / "ant", "ant")
    with pytest.raises(DataError, match="are both the split 'train'; join them or rename one"):
        ImageSource(str(tmp_path))


def test_an_image_folder_may_be_streamed(tmp_path):
    tidy(tmp_path)
    source = ImageSource(str(tmp_path), streaming=True)
    assert source.label_names == list(THREE)
    assert (len(source.train), len(source.test)) == (12, 6)
    assert sorted(item["label"] for item in source.train.table) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_tidy_folder_has_the_rows_in_the_order_of_before(tmp_path):
    tidy(tmp_path)
    old = load_dataset("imagefolder", data_dir=str(tmp_path))
    new = ImageSource(str(tmp_path))
    for rows, split in ((new.train, "train"), (new.test, "test")):
        assert rows.table["label"][:] == old[split]["label"][:]
        raw = old[split].cast_column("image", Image(decode=False))
        assert [item["path"] for item in rows.table["image"]] == [
            item["path"] for item in raw["image"]
        ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    tidy(tmp_path)
    (tmp_path / "train" / "ant").chmod(0)
    with pytest.raises(DataError, match="ant cannot be read"):
        ImageSource(str(tmp_path))


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_dataset(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("gld_zoo.training.data.opening.load_dataset", refuse)
    with pytest.raises(DataError, match=r"local copy cannot be written .* set HF_HOME"):
        ImageSource("some/where")


def test_datasets_is_not_asked_to_look_at_image_folders(tmp_path, monkeypatch):
    """Whose file-name patterns would guess at splits."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setattr("gld_zoo.training.data.opening.load_dataset", None)
    assert_read(ImageSource(str(tidy(tmp_path))), dict.fromkeys(THREE, (4, 2)))


def test_twelve_bits_in_sixteen_are_noted(tmp_path):
    for split in ("train", "test"):
        for name, top in (("ant", 4000), ("bee", 300)):
            (tmp_path / split / name).mkdir(parents=True)
            values = np.linspace(0, top, 64).reshape(8, 8).astype(np.uint16)
            PILImage.fromarray(values).save(tmp_path / split / name / "0.png")
    rows = ImageSource(str(tmp_path)).train
    assert "hold values up to 4000, so they are read almost black" in rows.note_of_depth()
    values = np.full((8, 8), 50_000, np.uint16)
    PILImage.fromarray(values).save(tmp_path / "train" / "bee" / "1.png")
    assert ImageSource(str(tmp_path)).train.note_of_depth() is None
    assert ImageSource(str(tidy(tmp_path / "rgb"))).train.note_of_depth() is None


def test_a_split_or_the_folder_itself_may_be_a_link(tmp_path):
    tidy(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for split in ("train", "test"):
        (tmp_path / "linked" / split).symlink_to(tmp_path / "real" / split)
    (tmp_path / "whole").symlink_to(tmp_path / "real")
    for name in ("linked", "whole"):
        assert_read(ImageSource(str(tmp_path / name)), dict.fromkeys(THREE, (4, 2)))


def test_a_class_folder_inside_a_class_folder_is_no_class(tmp_path):
    tidy(tmp_path)
    put(tmp_path / "train" / "ant" / "bee", "ant", 3)
    assert_read(ImageSource(str(tmp_path)), dict(ant=(7, 2), bee=(4, 2), cat=(4, 2)))


def test_an_empty_test_folder_is_no_split(tmp_path):
    tidy(tmp_path, test=0)
    with pytest.raises(DataError, match="has no split to measure on, only train"):
        ImageSource(str(tmp_path))
    (tmp_path / "val").mkdir()
    source = ImageSource(str(tmp_path), test_fraction=0.25)
    assert_read(source, dict.fromkeys(THREE, (3, 1)))


def test_a_class_folder_without_an_image_is_told(tmp_path):
    tidy(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    source = ImageSource(str(tmp_path))
    assert source.label_names == list(THREE)
    assert source.passed_over == {"folder without an image: dog": 1}


def test_classes_that_differ_in_case_or_by_a_blank_are_two(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "Cat", "cat "):
            put(tmp_path / split / name, "cat")
    assert ImageSource(str(tmp_path)).label_names == ["Cat", "cat", "cat "]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_but_named_as_one_is_named(tmp_path, content):
    tidy(tmp_path)
    (tmp_path / "train" / "bee" / "bad.png").write_bytes(content)
    source = ImageSource(str(tmp_path))
    with pytest.raises(DataError, match=r"bad\.png.* is not a readable image"):
        decode(source.train, Transforms(8).fit(), 8)


def test_a_file_named_as_a_split_is_no_split(tmp_path):
    for name in THREE:
        put(tmp_path / name, name, 4)
    (tmp_path / "train").write_text("a list")
    source = ImageSource(str(tmp_path), test_fraction=0.25)
    assert_read(source, dict.fromkeys(THREE, (3, 1)))
    assert source.passed_over == {"no image (no ending)": 1}


def test_what_is_neither_file_nor_folder_is_named(tmp_path):
    tidy(tmp_path)
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png leads to no file"):
        ImageSource(str(tmp_path))


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    tidy(tmp_path)
    picture("ant").save(tmp_path / "train" / "ant" / "x.png")
    os.rename(
        os.fsencode(tmp_path / "train" / "ant" / "x.png"),
        os.fsencode(tmp_path / "train" / "ant") + b"/\xff.png",
    )
    with pytest.raises(DataError, match="a name that is not UTF-8"):
        ImageSource(str(tmp_path))


def test_fractions_and_missing_values_are_no_classes(tmp_path):
    features = Features(image=Image(), label=Value("float64"))
    columns = columns_of(THREE, [0.0, 1.0, 2.0])
    splits = dict(train=columns, test=columns)
    folder = write_parquet(tmp_path / "a", splits, dict.fromkeys(splits, features))
    with pytest.raises(DataError, match=r"no column of type ClassLabel; .* label \(float64\)"):
        ImageSource(folder)
    features = Features(image=Image(), label=Value("string"))
    columns = columns_of(THREE, ["ant", None, "cat"])
    splits = dict(train=columns, test=columns_of(["ant"], ["ant"]))
    source = ImageSource(write_parquet(tmp_path / "b", splits, dict.fromkeys(splits, features)))
    with pytest.raises(DataError, match=r"row 1 of split 'train' .* has label None, not a class"):
        source.train.labels()


def test_a_table_whose_test_part_has_another_class_is_refused(tmp_path):
    for split, names in dict(train=("ant", "bee"), test=("ant", "dog")).items():
        lines = ["file_name,labels"]
        for name in names:
            put(tmp_path / "all", name, 1, ending=f"-{split}-{name}.png")
            lines.append(f"all/0-{split}-{name}.png,{name}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"has 1 classes that split 'train' .* has not: dog"):
        ImageSource(str(tmp_path))

"""`gld-zoo data` shows what a run would read, for people and as JSON, or says why none could."""

import json

import pytest
from PIL import Image as PILImage

from folders import THREE, picture, put, tidy
from gld_zoo.cli import main
from gld_zoo.training.commands.data import cli
from scenes import (
    detection_rows,
    segmentation_rows,
    write_detection,
    write_segmentation,
)


def show(capsys, *arguments):
    cli([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_folder_is_shown_as_a_run_would_read_it(tmp_path, capsys):
    tidy(tmp_path / "data")
    (tmp_path / "data" / "train" / "ant" / "0.txt").write_text("about 0")
    put(tmp_path / "data" / "test" / "ant", "ant", 1, first=3)  # as in train
    picture("bee").resize((5, 9)).convert("L").save(tmp_path / "data" / "train" / "bee" / "x.png")
    found = json.loads(show(capsys, tmp_path / "data", "--json"))
    assert found["splits"] == dict(train=13, test=7)
    assert found["classes"] == list(THREE)
    assert found["counts"] == dict(train=dict(ant=4, bee=5, cat=4), test=dict(ant=3, bee=2, cat=2))
    assert (found["image_column"], found["label_column"]) == ("image", "label")
    assert found["passed_over"] == {"no image (.txt)": 1}
    assert found["duplicates"] == 1
    assert found["warnings"] == [
        "1 images of test have the same pixels as one of train: scores are too good by them"
    ]
    seen = found["seen"]["train"]
    assert (seen["smallest"], seen["largest"], seen["commonest"]) == ("5x8", "8x9", "8x8")
    assert seen["modes"] == dict(RGB=12, L=1)
    printed = show(capsys, tmp_path / "data", "--duplicates", "false")
    assert "3 classes: ant, bee, cat" in printed
    assert "images of each class in train: ant 4, cat 4, bee 5" in printed
    assert "passed over: 1 x no image (.txt)" in printed
    assert "both splits hold" not in printed


def test_a_column_that_was_chosen_by_its_name_is_told(capsys):
    printed = show(capsys, "gld_zoo/data/cifar100_mini", "--duplicates", "false")
    told = "'fine_label', the usual name among fine_label, coarse_label (--label_column names "
    assert f"the labels are column {told}another)" in printed
    assert "the images are column" not in printed


def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path, capsys):
    tidy(tmp_path)
    broken = [tmp_path / "train" / "ant" / "x.png", tmp_path / "test" / "cat" / "y.png"]
    for path in broken:
        path.write_bytes(b"none")
    with pytest.raises(SystemExit) as stop:
        show(capsys, tmp_path)
    message = str(stop.value.code)
    assert message.startswith("error: 2 of the images cannot be read; remove or replace:\n")
    assert all(f"(file {path})" in message for path in broken)
    broken[0].unlink()
    with pytest.raises(SystemExit, match=r"y\.png\) is not a readable image"):
        show(capsys, tmp_path, "--duplicates", "false")


def test_gld_zoo_data_is_the_same_command(tmp_path, capsys):
    tidy(tmp_path)
    main(["data", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["classes"] == list(THREE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["data", str(tmp_path / "empty")])
    assert "holds no image" in str(stop.value.code)


def test_facts_and_a_contact_sheet_are_written(tmp_path, capsys):
    tidy(tmp_path / "data")
    options = ["--json", tmp_path / "facts.json", "--picture", tmp_path / "sheet.png"]
    printed = show(capsys, tmp_path / "data", *options)
    assert "images, each with a class: train 12, test 6" in printed
    assert json.loads((tmp_path / "facts.json").read_text())["counts"]["test"]["cat"] == 2
    with PILImage.open(tmp_path / "sheet.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(250, 0, 0), (0, 250, 0), (0, 0, 250)} <= colors


def test_a_class_without_images_is_a_warning(tmp_path, capsys):
    tidy(tmp_path)
    for path in (tmp_path / "test" / "cat").iterdir():
        path.unlink()
    found = json.loads(show(capsys, tmp_path, "--json"))
    assert found["warnings"] == ["no image of 1 classes in test: cat"]


@pytest.mark.parametrize("names", [("ant",), ()])
def test_a_dataset_that_no_run_could_use_is_an_error(tmp_path, capsys, names):
    tidy(tmp_path, names)
    with pytest.raises(SystemExit) as stop:
        cli([str(tmp_path)])
    message = "has one class alone, 'ant'" if names else "holds no image"
    assert str(stop.value.code).startswith("error: ")
    assert message in str(stop.value.code)


def test_boxes_and_masks_are_shown_too(tmp_path, capsys):
    rows = dict(train=detection_rows(range(4)), test=detection_rows(range(4, 6)))
    image, *_ = rows["train"][0]
    rows["train"].append((image, [], [], []))
    folder = write_detection(tmp_path / "boxes", rows)
    found = json.loads(show(capsys, folder, "--json"))
    assert (found["kind"], found["classes"]) == ("boxes", ["red", "green", "blue"])
    assert sum(found["counts"]["train"].values()) == 8
    assert found["warnings"] == ["1 images of train have no object"]
    rows = dict(train=segmentation_rows(range(3)), test=segmentation_rows(range(3, 5)))
    folder = write_segmentation(tmp_path / "masks", rows)
    printed = show(capsys, folder, "--picture", tmp_path / "sheet.png")
    assert "columns: image and mask" in printed
    assert (tmp_path / "sheet.png").stat().st_size > 5000

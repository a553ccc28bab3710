"""Several models side by side, on the split that their runs were measured on."""

import json
import math

import pytest
import torch

from gld_zoo.training.commands.compare import cli
from gld_zoo.training.commands.evaluate import cli as evaluate_cli
from gld_zoo.training.measure.comparison import comparison_table, gain
from gld_zoo.training.measure.scores import Scores
from helpers import assert_picture


def test_runs_are_compared_on_their_own_dataset(teacher_run, student_run, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "compared.png"
    cli([str(word) for word in (student_run, teacher_run, "--json", out, "--picture", picture)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert printed == comparison_table(result) + "\n"
    assert result["images"] == 33
    assert_picture(picture)
    for run, found in zip((student_run, teacher_run), result["models"], strict=True):
        assert found["model"] == str(run)
        assert found["top1"] == json.loads((run / "summary.json").read_text())["top1"]
    first, second = result["models"]
    assert first["gain"] == first["gain_error"] == 0
    assert second["gain"] == pytest.approx(second["top1"] - first["top1"])
    assert first["agreement"] == [100, second["agreement"][0]]
    # as one of the two is told to agree with the other by `evaluate`
    options = ["--model", str(student_run), "--teacher", str(teacher_run), "--json", str(out)]
    evaluate_cli(options)
    assert json.loads(out.read_text())["agreement"] == second["agreement"][0]


def test_the_error_of_a_gain_is_that_of_images_which_one_alone_has_right():
    target = torch.zeros(100, dtype=torch.long)
    first, second = torch.zeros(100, 1, 2), torch.zeros(100, 1, 2)
    first[:, 0, 0] = second[:, 0, 0] = 1.0
    first[:30, 0, 1] = 2.0  # 30 wrong
    second[20:40, 0, 1] = 2.0  # 20 wrong, 10 of them the same
    found = gain(Scores(second, target, 1.0), Scores(first, target, 1.0))
    # 20 won and 10 lost: the mean of 100 values of 1, -1 and 0
    assert found == pytest.approx((10.0, 100 * math.sqrt((0.3 - 0.1**2) / 100)))


def test_without_a_run_or_a_dataset_there_is_nothing_to_measure_on():
    with pytest.raises(SystemExit, match="none of gld_wrn16_1, gld_wrn16_2 is a run folder; name"):
        cli(["gld_wrn16_1", "gld_wrn16_2"])


def test_a_model_of_other_classes_is_refused(student_run):
    with pytest.raises(SystemExit, match="'gld_wrn16_1' has 100 classes and the dataset 4"):
        cli([str(student_run), "gld_wrn16_1"])

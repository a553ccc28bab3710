"""Releasing runs: what is written is what was trained, and mistakes are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import release


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "data").symlink_to(release.PACKAGE / "data")
    monkeypatch.setattr(release, "PACKAGE", tmp_path)
    return tmp_path


def released(runs, dataset, **options):
    return release.release(
        runs, "gld_wrn16_1.mine", "cifar100_wrn16_2_wrn16_1", str(dataset), **options
    )


def test_a_shipped_file_is_measured_and_kept_with_its_log(student_run, tiny_dataset, package):
    entry = released([student_run], tiny_dataset)
    summary = json.loads((student_run / "summary.json").read_text())
    assert entry["runs"][0]["top1"] == pytest.approx(summary["top1"], abs=0.01)
    assert entry["changes"] == dict(batch_size=16, epochs=2, lr=0.05)
    assert entry["file"] == "gld_wrn16_1.mine.safetensors"
    log = (package / "weights" / "gld_wrn16_1.mine.metrics.jsonl").read_text()
    assert log == (student_run / "metrics.jsonl").read_text()
    stored = json.loads((package / "weights" / "gld_wrn16_1.mine.logits.json").read_text())
    assert torch.tensor(stored["logits"]).shape == (2, 4)


def test_float16_is_for_matrices_and_filters_alone(student_run, tiny_dataset, package):
    # two rounded weights may turn one of 33 images
    released([student_run], tiny_dataset, float16=True)
    tensors = load_file(package / "weights" / "gld_wrn16_1.mine.safetensors")
    original = load_file(student_run / "last" / "model.safetensors")
    for name, tensor in tensors.items():
        expected = original[name].half() if tensor.ndim >= 2 else original[name]
        assert torch.equal(tensor, expected)


def test_seeds_of_one_row_are_listed_and_their_weights_need_not_ship(
    student_run, tiny_dataset, package, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(student_run, other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("seed: 0", "seed: 1"))
    entry = released([student_run, other], tiny_dataset, ship=False)
    assert [run["seed"] for run in entry["runs"]] == [0, 1]
    assert entry["file"] is None
    assert not list((package / "weights").glob("*.safetensors"))


def test_runs_that_do_not_belong_are_refused(
    student_run, teacher_run, tiny_dataset, package, tmp_path
):
    with pytest.raises(ValueError, match="another recipe: teacher"):
        released([student_run, teacher_run], tiny_dataset)
    with pytest.raises(ValueError, match="holds no finished run"):
        released([tmp_path], tiny_dataset)
    with pytest.raises(ValueError, match="trained gld_wrn16_1, not gld_wrn16_2"):
        release.release([student_run], "gld_wrn16_2.x", "cifar100_wrn16_2", str(tiny_dataset))
    wrong = tmp_path / "wrong"
    shutil.copytree(student_run, wrong)
    summary = json.loads((wrong / "summary.json").read_text())
    (wrong / "summary.json").write_text(json.dumps(dict(summary, top1=99.0)))
    with pytest.raises(ValueError, match=r"its log says 99\.00"):
        released([wrong], tiny_dataset)

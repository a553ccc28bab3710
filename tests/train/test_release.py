"""Releasing runs: what is written is what was trained, and mistakes are refused."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import release
from gld_zoo.results import Results
from gld_zoo.training.common.errors import RunError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.runs.finished_run import FinishedRun
from helpers import row


@pytest.fixture
def package(tmp_path, monkeypatch, teacher_run):
    (tmp_path / "weights").mkdir()
    (tmp_path / "data").symlink_to(release.PACKAGE / "data")
    monkeypatch.setattr(release, "PACKAGE", tmp_path)
    monkeypatch.setattr("gld_zoo.results.PATH", tmp_path / "results.json")
    on_record("gld_wrn16_2.theirs", teacher_run)
    return tmp_path


def on_record(name, run):
    digest = hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest()
    Results({}, {}, {name: row(sha256=digest)}).save()


def released(runs, dataset, **options):
    return release.release(
        runs, "gld_wrn16_1.mine", "cifar100_wrn16_2_wrn16_1", str(dataset), **options
    )


def test_a_shipped_file_is_measured_and_kept_with_its_log(student_run, tiny_dataset, package):
    entry = released([student_run], tiny_dataset).to_dict()
    summary = json.loads((student_run / "summary.json").read_text())
    (run,) = entry["runs"]
    assert run["top1"] == pytest.approx(summary["top1"], abs=0.01)
    assert (run["best_epoch"], run["best_epoch_top1"]) == (
        summary["best_epoch"],
        summary["best_epoch_top1"],
    )
    assert entry["schedule"] == "SGD, batch 16, lr 0.05 x0.1 at 50% and 75%"
    assert entry["precision"] == "float32"
    assert entry["changes"] == dict(batch_size=16, epochs=2, lr=0.05, teacher="gld_wrn16_2.theirs")
    assert entry["teacher"] == dict(summary["teacher"], name="gld_wrn16_2.theirs")
    assert entry["dataset"] == tiny_dataset.name
    assert entry["train_images"] == 64
    assert entry["file"] == "gld_wrn16_1.mine.safetensors"
    log = (package / "weights" / "gld_wrn16_1.mine.metrics.jsonl").read_text()
    assert log == (student_run / "metrics.jsonl").read_text()
    stored = json.loads((package / "weights" / "gld_wrn16_1.mine.logits.json").read_text())
    assert torch.tensor(stored["logits"]).shape == (2, 4)


def test_a_run_tells_all_its_launches_and_its_hours(student_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    environment = json.loads((run / "env.json").read_text())
    again = [dict(environment, commit="b", threads=2), dict(environment, commit="a")]
    environment.update(commit="a", threads=1, processor="x86_64, 4 cores", resumed=again)
    for launch in (environment, *again):
        launch.update(processor="x86_64, 4 cores", processes=2)
    again[0]["mixed_precision"] = "bf16"
    (run / "env.json").write_text(json.dumps(environment))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(dict(summary, seconds=9000, best_epoch_top1=77)))
    finished = FinishedRun.load(run)
    description = finished.description()
    assert description["hardware"] == "cpu, x86_64, 4 cores, 2 processes, 1 and 2 threads"
    assert description["precision"] == "float32 and bf16"
    scores = finished.scores()
    assert (scores["commit"], scores["hours"], scores["best_epoch_top1"]) == ("a, b", 2.5, 77)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(lr_drops=[]), "SGD, batch 64, lr 0.1"),
        (dict(lr_drops=[0.3], lr_decay=0.2), "SGD, batch 64, lr 0.1 x0.2 at 30%"),
        (dict(schedule="poly"), "SGD, batch 64, lr 0.1 times (1 - share of the epochs)^0.9"),
        (dict(lr_drops=[], warmup_epochs=2), "SGD, batch 64, lr 0.1 after a warm-up of 2 epochs"),
        (
            dict(nesterov=True, schedule="rex", ema=0.999),
            "Nesterov SGD, batch 64, lr 0.1 to 0 (rex) with an average of the weights (0.999 a "
            "step)",
        ),
        (dict(opt="adamw", lr=1e-3, schedule="cosine"), "adamw, batch 64, lr 0.001 to 0 (cosine)"),
    ],
)
def test_schedules_are_told_in_words(student_run, options, words):
    finished = dataclasses.replace(
        FinishedRun.load(student_run), recipe=Recipe(student="gld_wrn16_1", **options)
    )
    assert finished.description()["schedule"] == words


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
    entry = released([student_run, other], tiny_dataset, ship=False).to_dict()
    assert [run["seed"] for run in entry["runs"]] == [0, 1]
    assert entry["file"] is None
    assert not list((package / "weights").glob("*.safetensors"))


def test_a_row_may_begin_with_the_weights_of_another(student_run, tiny_dataset, package, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    recipe = (run / "recipe.yaml").read_text()
    recipe = recipe.replace("student: gld_wrn16_1", "student: gld_wrn16_1.ce_cifar100")
    (run / "recipe.yaml").write_text(recipe.replace("finetune: null", "finetune: all"))
    changes = released([run], tiny_dataset, ship=False).changes
    assert (changes["student"], changes["finetune"]) == ("gld_wrn16_1.ce_cifar100", "all")


def test_runs_that_do_not_belong_are_refused(
    student_run, teacher_run, tiny_dataset, package, tmp_path
):
    with pytest.raises(ValueError, match="another recipe: teacher"):
        released([student_run, teacher_run], tiny_dataset)
    with pytest.raises(ValueError, match="is a second run of seed 0"):
        released([student_run, student_run], tiny_dataset)
    with pytest.raises(ValueError, match="--name gld_wrn16_1 has no tag"):
        release.release([student_run], "gld_wrn16_1", "cifar100_wrn16_1", str(tiny_dataset))
    with pytest.raises(RunError, match="holds no finished run"):
        released([tmp_path], tiny_dataset)
    with pytest.raises(ValueError, match="trained gld_wrn16_1, not gld_wrn16_2"):
        release.release([student_run], "gld_wrn16_2.x", "cifar100_wrn16_2", str(tiny_dataset))
    wrong = tmp_path / "wrong"
    shutil.copytree(student_run, wrong)
    summary = json.loads((wrong / "summary.json").read_text())
    (wrong / "summary.json").write_text(json.dumps(dict(summary, top1=summary["top1"] + 0.02)))
    released([student_run], tiny_dataset)
    before = {path: path.read_bytes() for path in (package / "weights").iterdir()}
    old = tmp_path / "old"
    shutil.copytree(student_run, old)
    (old / "summary.json").write_text(json.dumps(dict(top1=1.0, top5=2.0)))
    with pytest.raises(RunError, match="did not record its teacher; delete its"):
        released([old], tiny_dataset)
    with pytest.raises(ValueError, match=f"its log says {summary['top1'] + 0.02:.2f}"):
        released([wrong], tiny_dataset)
    assert {path: path.read_bytes() for path in (package / "weights").iterdir()} == before
    on_record("gld_wrn16_2.another", student_run)
    with pytest.raises(ValueError, match=r"results\.json does not hold; release the teacher first"):
        released([student_run], tiny_dataset)


def test_seeds_had_one_teacher_one_precision_and_one_number_of_processes(student_run, tmp_path):
    bf16 = "in part, with mixed_precision bf16, .* with no;"
    words = dict(teacher="teacher of other weights", precision=bf16, launches=bf16)
    words["processes"] = "in part, with processes 2, .* with 1;"
    for name, file, key, value in [
        ("teacher", "summary.json", "teacher", dict(name="x", sha256="y", top1=1.0)),
        ("precision", "env.json", "mixed_precision", "bf16"),
        ("processes", "env.json", "processes", 2),
        ("launches", "env.json", "resumed", [dict(mixed_precision="bf16", processes=1)]),
    ]:
        other = tmp_path / name
        shutil.copytree(student_run, other)
        recipe = (other / "recipe.yaml").read_text()
        (other / "recipe.yaml").write_text(recipe.replace("seed: 0", "seed: 1"))
        content = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**content, key: value}))
        with pytest.raises(ValueError, match=words[name]):
            release.check_seeds([FinishedRun.load(student_run), FinishedRun.load(other)])


def test_a_file_that_is_too_large_leaves_the_package_alone(
    student_run, tiny_dataset, package, monkeypatch
):
    monkeypatch.setattr(release, "LARGEST", 1000)
    with pytest.raises(ValueError, match="bytes, more than 1,000; try --float16"):
        released([student_run], tiny_dataset)
    assert not list((package / "weights").iterdir())


def test_a_teacher_loaded_from_float16_is_known_by_its_tag(teacher_run, package):
    """Students of the zoo's large teachers are distilled from the files that ship."""
    import timm

    from gld_zoo.training.build.create import weights_sha256

    folder = package / "weights" / "half"
    release.repack(FinishedRun.load(teacher_run), folder, float16=True)
    overlay = dict(file=str(folder / "model.safetensors"), num_classes=4)
    model = timm.create_model("gld_wrn16_1", pretrained=True, pretrained_cfg_overlay=overlay)
    found = row(sha256="of the file", file="half/model.safetensors")
    Results({}, {"gld_wrn16_1.half": found}, {}).save()
    teacher = dict(name="gld_wrn16_1.half", sha256=weights_sha256(model), top1=1.0)
    assert release.teacher_on_record(teacher) == teacher


def test_a_name_is_a_weight_or_a_run():
    results = Results(dict(b=dict()), {}, {"x.y": row()})
    release.record(results, "x.y", row(file="x.y.safetensors"), ("b", "gld"))
    assert (list(results.weights), list(results.runs)) == (["x.y"], [])
    assert results.setups["b"]["gld"]["weights"] == "x.y"
    release.record(results, "x.y", row(), None)
    assert (list(results.weights), list(results.runs)) == ([], ["x.y"])
    assert results.setups["b"]["gld"]["weights"] == "x.y"

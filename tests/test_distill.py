"""The trainer as a user runs it: two epochs, sixty-four real images."""

import json
import shutil

import pytest
import timm
import torch
from conftest import SMALL_RUN, launch, read_lines
from datasets import load_dataset
from safetensors.torch import load_file

from distill import NonFiniteLossError, check_finite, summarize


def test_run_folder_holds_what_the_design_says(student_run):
    lines = read_lines(student_run / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2]
    terms = {"loss", "loss_ce", "loss_global", "loss_local", "loss_relation"}
    scores = {
        "lr",
        "train_top1",
        "train_top5",
        "test_top1",
        "test_top5",
        "images_per_second",
        "seconds",
    }
    assert terms | scores <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms - {"loss"}), rel=1e-5)
    summary = json.loads((student_run / "summary.json").read_text())
    assert summary["top1"] == lines[-1]["test_top1"]
    assert summary["teacher_top1"] is not None
    environment = json.loads((student_run / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (student_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (student_run / "checkpoints").iterdir()) == [
        "epoch-00001",
        "epoch-00002",
    ]
    assert not [
        path
        for path in student_run.rglob("*")
        if path.suffix in {".pkl", ".bin", ".pt", ".pth", ".partial"}
    ]


def test_printed_lines_tell_teacher_before_after_and_where(student_run):
    printed = (student_run / "printed.txt").read_text()
    summary = json.loads((student_run / "summary.json").read_text())
    assert f"teacher {summary['teacher_top1']:.2f} %" in printed
    assert f"before, {summary['top1']:.2f} % after" in printed
    assert str(student_run) in printed


@torch.no_grad()
def test_last_is_loaded_by_timm_and_scores_what_was_logged(student_run, tiny_dataset):
    model = timm.create_model(f"local-dir:{student_run}/last", pretrained=True).eval()
    assert model.num_classes == 4
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    test = load_dataset(str(tiny_dataset))["test"]
    images = torch.stack([transform(image.convert("RGB")) for image in test["img"]])
    correct = (model(images).argmax(1) == torch.tensor(test["fine_label"])).sum().item()
    assert 100 * correct / 33 == pytest.approx(
        read_lines(student_run / "metrics.jsonl")[-1]["test_top1"]
    )
    config = json.loads((student_run / "last" / "config.json").read_text())
    assert config["label_names"] == ["apple", "aquarium_fish", "baby", "bear"]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0


def test_saved_recipe_repeats_the_run_to_the_bit(student_run, tmp_path, distill):
    distill("--config", student_run / "recipe.yaml", "--run", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / "last" / name).read_bytes() == (
            student_run / "last" / name
        ).read_bytes()


@pytest.mark.parametrize("damage", [None, "truncated", "flipped", "missing"])
def test_resume_gives_the_same_bits(student_run, tmp_path, distill, damage):
    """Copy the run as a kill before the export left it, then hurt its last checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    shutil.rmtree(run / "last")
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "epoch-00002" / "model.safetensors"
    content = newest.read_bytes()
    if damage is None:
        shutil.rmtree(newest.parent)
    elif damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        newest.unlink()
    output = distill("--config", student_run / "recipe.yaml", "--run", run, "--resume")
    assert "after 1 epochs" in output
    assert ("damaged" in output) == (damage is not None)
    assert (run / "last" / "model.safetensors").read_bytes() == (
        student_run / "last" / "model.safetensors"
    ).read_bytes()
    ours, theirs = (read_lines(folder / "metrics.jsonl")[-1] for folder in (run, student_run))
    assert {name: ours[name] for name in ours if "second" not in name} == {
        name: theirs[name] for name in theirs if "second" not in name
    }


def test_two_processes_share_the_run_of_one(student_run, tmp_path):
    """Batch norm is each process's own, so weights differ; schedule and counts do not."""
    launch("--config", student_run / "recipe.yaml", "--run", tmp_path / "two", processes=2)
    one, two = (read_lines(folder / "metrics.jsonl") for folder in (student_run, tmp_path / "two"))
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    for line in two:  # 33 images on two processes: none dropped, none counted twice
        correct = line["test_top1"] * 33 / 100
        assert correct == pytest.approx(round(correct))
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_trains(tiny_dataset, tmp_path, distill):
    distill(*SMALL_RUN, "--dataset", tiny_dataset, "--run", tmp_path / "run", "--compile", "true")
    tensors = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert not [name for name in tensors if "_orig_mod" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "./no/such/folder"], "there is no such folder"),
        (
            ["--dataset", "no-such-org/no-such-set"],
            "neither a folder nor could it be loaded from the hub",
        ),
        (["--image_column", "picture"], "image_column='picture' is not a column"),
        (["--label_column", "img"], "label_column='img' is a column of type"),
        (["--test_split", "dev"], "no split 'dev'; it has train, test"),
        (["--teacher", "gld_resnet110"], "No pretrained weights exist for gld_resnet110"),
        (["--student", "no_such_model"], "student='no_such_model'"),
        (["--batch_size", "65"], "64 images, fewer than batch_size=65"),
        (["--student", "gld_resnet18", "--image_size", "32"], "at least 2x2, got 1x1"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--epochs", "many"], "epochs"),
        (["--alpha", "2"], "alpha=2"),
    ],
)
def test_errors_name_the_value_and_leave_no_folder(
    tiny_dataset, teacher_run, tmp_path, distill, options, message
):
    base = [*SMALL_RUN, "--teacher", f"local-dir:{teacher_run}/last", "--dataset", tiny_dataset]
    output = distill(*base, "--run", tmp_path / "run", *options, fails=True)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_teacher_of_other_classes_is_refused(teacher_run, tmp_path, distill):
    teacher = f"local-dir:{teacher_run}/last"
    bundled = "gld_zoo/data/cifar100_mini"
    output = distill(
        *SMALL_RUN,
        "--teacher",
        teacher,
        "--dataset",
        bundled,
        "--run",
        tmp_path / "run",
        fails=True,
    )
    assert "has 4 classes and the dataset 100" in output


def test_existing_runs_are_never_overwritten(student_run, tiny_dataset, tmp_path, distill):
    recipe = ["--config", student_run / "recipe.yaml"]
    before = {path: path.stat().st_mtime_ns for path in student_run.rglob("*")}
    assert "holds a finished run" in distill(*recipe, "--run", student_run, fails=True)
    assert "nothing to resume" in distill(*recipe, "--run", student_run, "--resume")
    assert "another recipe (lr: 0.2 here, 0.05 there)" in distill(
        *recipe, "--run", student_run, "--resume", "--lr", 0.2, fails=True
    )
    assert {path: path.stat().st_mtime_ns for path in student_run.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert "is a file" in distill(*recipe, "--run", tmp_path / "file", fails=True)
    assert "holds no run" in distill(*recipe, "--run", tiny_dataset, fails=True)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_dataset, tmp_path, distill):
    options = ["--dataset", tiny_dataset, "--run", tmp_path / "run", "--lr", 1e30]
    output = distill(*SMALL_RUN, *options, fails=True)
    assert "the loss is not finite at step 2 of epoch 1: loss" in output


def test_the_first_bad_step_is_named():
    recent = torch.ones(5, 2)
    recent[3:, 1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 24 of epoch 3: loss 1, loss_ce nan"):
        check_finite(recent, ["loss", "loss_ce"], step=25, epoch=2)
    check_finite(recent[:3], ["loss", "loss_ce"], step=23, epoch=2)


def test_the_headline_is_the_last_epoch():
    history = [
        dict(epoch=i, test_top1=top1, test_top5=90.0, seconds=1.0)
        for i, top1 in ((1, 70.0), (2, 60.0))
    ]
    summary = summarize(history, None)
    assert (summary["top1"], summary["best_epoch"], summary["best_epoch_top1"]) == (60.0, 1, 70.0)

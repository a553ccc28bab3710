"""The trainer as a user runs it: two epochs, sixty-four real images."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Features, Image, load_dataset
from safetensors.torch import load_file, save_file

from gld_zoo.distillation.teacher import Teacher
from gld_zoo.hub import save_pretrained
from gld_zoo.training.build.class_names import match_classes
from gld_zoo.training.build.create import create_frozen, create_student
from gld_zoo.training.build.refusals import check_lone_image
from gld_zoo.training.build.run_models import build_models
from gld_zoo.training.commands.distill import cli, teaches_photographs
from gld_zoo.training.common.errors import ModelError, NonFiniteLossError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.totals import Totals
from gld_zoo.training.runs.finished_run import FinishedRun
from gld_zoo.training.runs.run_folder import summarize
from gld_zoo.training.tasks.labels import accuracy
from helpers import CHECKOUT, FEATURES, SMALL_RUN, launch, read_lines, write_dataset


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
    assert summary["teacher"]["top1"] > 0
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
    assert f"teacher {summary['teacher']['top1']:.2f} %" in printed
    assert f"before (random weights), {summary['top1']:.2f} % after" in printed
    best, epoch = summary["best_epoch_top1"], summary["best_epoch"]
    assert f"best top-1 of an epoch, as a note: {best:.2f} % at epoch {epoch} (test)" in printed
    assert str(student_run) in printed


def test_last_carries_names_and_preprocessing(student_run):
    model = timm.create_model(f"local-dir:{student_run}/last", pretrained=True)
    assert model.num_classes == 4
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
    assert len(list(run.glob("checkpoints/.epoch-00002.damaged"))) == (damage is not None)
    assert (run / "last" / "model.safetensors").read_bytes() == (
        student_run / "last" / "model.safetensors"
    ).read_bytes()
    ours, theirs = (read_lines(folder / "metrics.jsonl")[-1] for folder in (run, student_run))
    assert {name: ours[name] for name in ours if "second" not in name} == {
        name: theirs[name] for name in theirs if "second" not in name
    }


@torch.no_grad()
def score(run, dataset):
    """Measure a run's `last/` in float32, apart from the trainer: top-1 in % and cross-entropy."""
    model = timm.create_model(f"local-dir:{run}/last", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    test = load_dataset(str(dataset))["test"]
    images = torch.stack([transform(image.convert("RGB")) for image in test["img"]])
    logits, target = model(images), torch.tensor(test["fine_label"])
    return dict(
        test_top1=100 * (logits.argmax(1) == target).double().mean().item(),
        test_loss=torch.nn.functional.cross_entropy(logits, target).item(),
    )


def assert_logged_scores_are_those_of_last(run, dataset):
    logged = read_lines(run / "metrics.jsonl")[-1]
    for name, value in score(run, dataset).items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name


def test_logged_scores_are_those_of_the_saved_weights(student_run, tiny_dataset):
    assert_logged_scores_are_those_of_last(student_run, tiny_dataset)


@pytest.mark.slow
def test_accelerates_launcher_runs_the_same_program(student_run, tmp_path):
    launch("--config", student_run / "recipe.yaml", "--run", tmp_path / "run")
    files = [folder / "last" / "model.safetensors" for folder in (tmp_path / "run", student_run)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
def test_scores_are_float32_under_bf16_training(
    teacher_run, tiny_dataset, tmp_path, distilled, distill, monkeypatch
):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    teacher = ["--teacher", f"local-dir:{teacher_run}/last"] if distilled else []
    run = tmp_path / "run"
    options = [*SMALL_RUN, *teacher, "--dataset", tiny_dataset, "--run", run]
    try:
        output = distill(*options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    slow = torch.backends.cpu.get_cpu_capability() == "AVX2"  # which has none of its instructions
    assert not slow or "no instructions for bf16" in output
    assert json.loads((run / "env.json").read_text())["mixed_precision"] == "bf16"
    assert_logged_scores_are_those_of_last(run, tiny_dataset)


def test_a_run_folder_teaches_as_its_last_weights_do(
    student_run, teacher_run, tiny_dataset, tmp_path, distill
):
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--run", run]
    distill(*options, "--teacher", teacher_run)
    name = "model.safetensors"
    assert (run / "last" / name).read_bytes() == (student_run / "last" / name).read_bytes()
    assert FinishedRun.load(run).portable().teacher == "local-dir:teacher/last"


@pytest.mark.slow
def test_two_processes_share_the_run_of_one(student_run, tiny_dataset, tmp_path):
    """Batch norm is each process's own, so weights differ; schedule and counts do not."""
    run = tmp_path / "two"
    launch("--config", student_run / "recipe.yaml", "--run", run, processes=2)
    one, two = (read_lines(folder / "metrics.jsonl") for folder in (student_run, run))
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert_logged_scores_are_those_of_last(run, tiny_dataset)  # 33 images, none dropped or twice


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(teacher_run, tiny_dataset, tmp_path, distill):
    """Without batch norm nothing is a process's own: same gradients, relation included."""
    options = ["--student", "convnext_atto", "--teacher", f"local-dir:{teacher_run}/last"]
    options += ["--grid", 1, "--epochs", 1, "--batch_size", 16, "--lr", 0.01, "--beta", 5]
    options += ["--dataset", tiny_dataset, "--image_size", 32, "--threads", 1]
    distill(*options, "--run", tmp_path / "1")
    launch(*options, "--run", tmp_path / "2", processes=2)
    weights = [load_file(tmp_path / name / "last" / "model.safetensors") for name in "12"]
    for name, value in weights[0].items():
        # float32 sums in another order, four steps: 1e-6 of a weight's size
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(student_run, teacher_run, tmp_path, distill):
    """SIGKILL after a checkpoint within an epoch, wherever the process then is."""
    options = ["--config", student_run / "recipe.yaml", "--epochs", 4]
    distill(*options, "--run", tmp_path / "unbroken")
    run = tmp_path / "killed"
    often = ["--checkpoint_minutes", 0]
    command = [sys.executable, CHECKOUT / "train" / "distill.py", *options, *often, "--run", run]
    environment = dict(os.environ, PYTHONPATH=str(CHECKOUT))
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("epoch-00001-step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert not (run / "summary.json").exists()
    distill(*options, "--run", run, "--resume")
    weights = [folder / "last" / "model.safetensors" for folder in (run, tmp_path / "unbroken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_damaged_checkpoints_alone_are_no_reason_to_start_over(student_run, tmp_path, distill):
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("")
    options = ["--config", student_run / "recipe.yaml", "--run", run, "--resume"]
    assert "no checkpoint in" in distill(*options, fails=True)
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_resumed_run_keeps_its_first_environment(student_run, tmp_path, distill):
    run = tmp_path / "run"
    shutil.copytree(student_run, run)
    (run / "summary.json").unlink()
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(dict(environment, processes=4, threads=8)))
    output = distill("--config", student_run / "recipe.yaml", "--run", run, "--resume")
    assert "processes was 4 and is 1" in output
    assert "threads was 8 and is 1" in output
    assert "torch was" not in output
    after = json.loads((run / "env.json").read_text())
    assert after["processes"] == 4
    assert [resumed["processes"] for resumed in after["resumed"]] == [1]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_images_or_another_teacher(
    rows, teacher_run, tmp_path, distill
):
    """The options name both as before; what lies there has changed."""
    shutil.copytree(teacher_run / "last", tmp_path / "teacher")
    data = tmp_path / "data"
    cut = {name: {k: v[:64] for k, v in columns.items()} for name, columns in rows.items()}
    write_dataset(data, cut)
    run = ["--run", tmp_path / "run"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    distill(*SMALL_RUN, *teacher, "--dataset", data, *run, "--max_minutes", 0)
    resume = [*run, "--resume", "--max_minutes", "null"]

    relabelled = dict(cut["train"], fine_label=cut["train"]["fine_label"][::-1])
    fewer = {key: column[:48] for key, column in cut["train"].items()}
    for train, words in [
        (fewer, "was begun with train_images 64 and finds 48 now; put back"),
        (relabelled, "was begun with labels"),
    ]:
        write_dataset(data, dict(cut, train=train))
        assert words in distill(*resume, fails=True)
    write_dataset(data, cut)
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    save_file(dict(tensors, **{"fc.bias": tensors["fc.bias"] + 1}), file, metadata={"format": "pt"})
    assert "was begun with teacher" in distill(*resume, fails=True)
    shutil.copyfile(teacher_run / "last" / "model.safetensors", file)
    assert "after" in distill(*resume)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_trains(tiny_dataset, tmp_path, distill):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    distill(*SMALL_RUN, "--dataset", tiny_dataset, "--run", tmp_path / "run", "--compile", "true")
    tensors = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert not [name for name in tensors if "_orig_mod" in name]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "./no/such/folder"], "there is no such folder"),
        (
            ["--dataset", "no-such-org/no-such-set"],
            "neither a folder nor could it be loaded from the hub",
        ),
        (["--image_column", "picture"], "image_column='picture' is not a column in"),
        (["--label_column", "img"], "label_column='img' is not of type ClassLabel"),
        (["--test_split", "dev"], "no split 'dev'; it has train, test"),
        (["--teacher", "gld_resnet44"], "No pretrained weights exist for gld_resnet44"),
        (["--student", "no_such_model"], "student='no_such_model'"),
        (["--batch_size", "65"], "64 images, fewer than batch_size=65; use a smaller"),
        (["--student", "gld_resnet18", "--image_size", "32"], "at least 2x2, got 1x1"),
        (["--student", "efficientvit_b0"], "EfficientVit does not begin with average pooling"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--epochs", "many"], 'error: Parser key "epochs"'),
        (["--alpha", "2"], "alpha=2"),
        (["--train_images", "9"], "train_images=9 is for streaming"),
        (["--crop_scale", "[0.5, 1]"], "crop_scale=[0.5, 1.0] is for crop: resized"),
        (["--crop", "resized", "--crop_padding", "8"], "crop_padding=8 is for crop: padded"),
        (["--shuffle_buffer", "8"], "shuffle_buffer=8 is for streaming"),
        (["--schedule", "rex", "--lr_decay", "0.2"], "lr_decay=0.2 is for schedule: steps"),
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


def test_unreadable_image_ends_the_run_by_its_row(rows, tmp_path, distill):
    columns = {key: list(column) for key, column in rows["train"].items()}
    columns["img"][37] = {"bytes": b"no image", "path": None}
    folder = write_dataset(tmp_path / "set", dict(train=columns, test=rows["test"]))
    run = tmp_path / "run"
    output = distill(*SMALL_RUN, "--dataset", folder, "--run", run, fails=True)
    assert "row 37 of split 'train'" in output
    assert not run.exists()


def test_unknown_key_of_a_recipe_file_ends_the_run(tmp_path, distill):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("student: gld_resnet20\nepoch: 3\n")
    output = distill("--config", recipe, "--run", tmp_path / "run", fails=True)
    assert "epoch" in output.rpartition("error: ")[2]  # the usage comes before
    assert not (tmp_path / "run").exists()


def test_float16_is_refused_where_accelerate_would_leave_it_out(
    tiny_dataset, tmp_path, distill, monkeypatch
):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which reads it once a process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    options = ["--dataset", tiny_dataset, "--run", tmp_path / "run"]
    assert "fp16 is for GPUs" in distill(*SMALL_RUN, *options, fails=True)
    assert not (tmp_path / "run").exists()


def test_gradient_accumulation_is_refused(tiny_dataset, tmp_path, distill, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    options = ["--dataset", tiny_dataset, "--run", tmp_path / "run"]
    assert "gradient accumulation over 2 steps" in distill(*SMALL_RUN, *options, fails=True)


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
    assert "teacher_head: fit" in output
    assert "teacher_head: none" in output


@pytest.fixture(scope="session")
def reordered(tmp_path_factory, rows):
    """The images of `tiny_dataset`, their classes in another order."""
    names = FEATURES["fine_label"].names[::-1]
    features = Features(img=Image(), fine_label=ClassLabel(names=names))
    columns = {
        name: dict(part, fine_label=[3 - label for label in part["fine_label"]])
        for name, part in rows.items()
    }
    return write_dataset(tmp_path_factory.mktemp("reordered"), columns, features)


def test_a_teacher_with_the_classes_in_another_order_is_matched_by_name(
    teacher_run, reordered, tmp_path, distill
):
    options = ["--teacher", f"local-dir:{teacher_run}/last", "--max_minutes", 0]
    output = distill(*SMALL_RUN, *options, "--dataset", reordered, "--run", tmp_path / "run")
    assert "teacher local-dir:" in output
    model = create_frozen(f"local-dir:{teacher_run}/last", torch.device("cpu"))
    names = FEATURES["fine_label"].names
    assert match_classes(model, names, "teacher") is None
    assert match_classes(model, names[::-1], "teacher") == [3, 2, 1, 0]
    swapped = [names[1].replace("_", " ").title(), names[0], *names[2:]]  # spelling is no name
    assert match_classes(model, swapped, "teacher") == [1, 0, 2, 3]
    images = torch.randn(2, 3, 32, 32)
    statistics = ((0.5,) * 3, (0.25,) * 3)
    rows = Teacher(model, 2, *statistics)(images)
    model = create_frozen(f"local-dir:{teacher_run}/last", torch.device("cpu"))
    matched = Teacher(model, 2, *statistics, columns=[3, 2, 1, 0])
    assert torch.equal(matched(images), rows.flip(2))
    assert torch.equal(
        matched.classify(images), Teacher(model, 2, *statistics).classify(images).flip(1)
    )


def test_a_teacher_of_which_some_classes_alone_stand_elsewhere_is_refused(teacher_run, tmp_path):
    model = create_frozen(f"local-dir:{teacher_run}/last", torch.device("cpu"))
    names = [*FEATURES["fine_label"].names[1:], "boat"]
    with pytest.raises(ModelError, match="some of the dataset's classes at other places"):
        match_classes(model, names, "teacher")


def test_classes_that_are_numbers_have_an_order_too(tmp_path):
    """An image folder's are sorted as text, '10' before '2'."""
    numbers = [str(i) for i in range(11)]
    model = timm.create_model("gld_wrn16_1", num_classes=11)
    folder = f"local-dir:{save_pretrained(model, tmp_path / 'model', label_names=numbers)}"
    create_frozen(folder, torch.device("cpu"), label_names=numbers)
    with pytest.raises(ModelError, match="another order: class 2 is '2' to it and '10' to the dat"):
        create_frozen(folder, torch.device("cpu"), label_names=sorted(numbers))


def test_a_student_of_other_classes_begins_with_a_new_classifier(teacher_run, reordered):
    name, device = f"local-dir:{teacher_run}/last", torch.device("cpu")
    kept = create_student(name, FEATURES["fine_label"].names, device, finetune="all")
    new = create_student(name, FEATURES["fine_label"].names[::-1], device, finetune="all")
    weights, others = kept.state_dict(), new.state_dict()
    same = {key for key in weights if weights[key].equal(others[key])}
    assert weights.keys() - same == {"fc.weight", "fc.bias"}
    assert create_student(name, list("abcde"), device, finetune="all").num_classes == 5


def test_a_student_is_never_half_random(teacher_run, tmp_path):
    """Of other classes, timm would begin at random where the file has no such weights."""
    folder = shutil.copytree(teacher_run / "last", tmp_path / "last")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layer1.0.conv1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r'(?s)Missing key.*"layer1.0.conv1.weight"'):
        create_student(f"local-dir:{folder}", list("abcde"), torch.device("cpu"), finetune="all")


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


def test_weights_that_are_not_finite_are_never_written(tiny_dataset, tmp_path, distill):
    """The loss of an epoch's only step is from before the weights exploded."""
    run = tmp_path / "run"
    options = ["--dataset", tiny_dataset, "--run", run, "--lr", 1e38, "--batch_size", 64]
    output = distill(*SMALL_RUN, *options, "--epochs", 1, fails=True)
    assert "after epoch 1" in output
    assert "try a smaller lr" in output
    assert not (run / "last").exists()
    assert not list(run.glob("checkpoints/epoch*"))


def test_weights_that_are_not_used_are_told_of(tiny_dataset, tmp_path, distill):
    options = ["--student", "gld_wrn16_1.ce_cifar100", "--max_minutes", 0]
    output = distill(*SMALL_RUN, "--dataset", tiny_dataset, "--run", tmp_path / "run", *options)
    assert "gld_wrn16_1.ce_cifar100 begins at random; --finetune all" in output


def test_the_first_bad_step_is_named():
    totals = Totals(torch.device("cpu"))
    others = accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    for value in (1.0, 2.0, 3.0, float("nan"), float("nan")):
        terms = dict(loss=torch.tensor(1.0), loss_ce=torch.tensor(value))
        totals.add(terms, others)
        if value == 3:
            totals.check(23, epoch=2)
            expected = dict(loss=1.0, loss_ce=2.0, train_top1=75.0, train_top5=100.0)
            assert totals.means() == expected
    with pytest.raises(NonFiniteLossError, match="step 24 of epoch 3: loss 1, loss_ce nan"):
        totals.check(25, epoch=2)


def test_the_headline_is_the_last_epoch():
    history = [
        dict(epoch=i, test_top1=top1, test_top5=90.0, seconds=1.0)
        for i, top1 in ((1, 70.0), (2, 60.0))
    ]
    summary = summarize(history, dict(top1=60.0, top5=90.0), "top1")
    assert (summary["top1"], summary["best_epoch"], summary["best_epoch_top1"]) == (60.0, 1, 70.0)


def test_top5_counts_five():
    found = accuracy(-torch.arange(10.0).expand(3, 10), torch.tensor([0, 4, 5]))
    assert found["train_top1"].item() == pytest.approx(100 / 3)
    assert found["train_top5"].item() == pytest.approx(200 / 3)


def test_means_are_of_the_steps_that_were_checked():
    totals = Totals(torch.device("cpu"))
    for step in (1, 2, 3, 4):
        totals.add(dict(loss=torch.tensor(float(step))), {})
        if step != 3:
            totals.check(step, epoch=0)
    assert totals.means() == dict(loss=2.5)
    totals.add(dict(loss=torch.tensor(9.0)), {})
    assert totals.means() == dict(loss=2.5)


def test_a_run_folders_name_that_is_too_long_is_named_and_nothing_is_left(
    tmp_path, distill, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    message = "is too long; name a shorter one by --run"
    for run in ("x" * 300, f"new/{'x' * 300}", f"{'x' * 300}/deep", "/".join(["x" * 200] * 30)):
        for more in ([], ["--resume"]):
            output = distill(*SMALL_RUN, "--dataset", "none", "--run", run, *more, fails=True)
            assert f"error: the name of the run folder {run} {message}" in output
    student = f"local-dir:{'models/' * 50}"  # the default name is made from it
    output = distill("--student", student, "--dataset", "none", fails=True)
    assert re.search(f"the name of the run folder runs/local-dir.* {message}", output)
    assert not list(tmp_path.iterdir())
    for run in (".", ".."):  # which have nothing above them by name
        output = distill(*SMALL_RUN, "--dataset", "none", "--run", run, fails=True)
        assert "is too long" not in output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_run_folder_that_may_not_be_read_is_named(tmp_path, distill):
    (tmp_path / "run").mkdir(mode=0)
    for run in ("run", "run/deep"):
        output = distill(*SMALL_RUN, "--dataset", "none", "--run", tmp_path / run, fails=True)
        assert "Permission denied; name another by --run" in output


def test_messages_that_the_terminal_cannot_hold_are_escaped(tiny_dataset, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run = tmp_path / "\u4e2d\xf6\udcf6"
    options = [*SMALL_RUN, "--epochs", 1, "--dataset", tiny_dataset, "--run", run]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        cli([str(option) for option in options])
    assert r"\u4e2d\xf6\udcf6" in terminal.buffer.getvalue().decode("ascii")
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize(
    ("names", "labels", "here", "there"),
    [
        (["ant", "Bee", "cat"], ["bee", "cat", "dog"], "class 1 is 'Bee'", "class 0 'bee'"),
        (["Great_Tit", "owl", "x"], ["owl", "y", "great-tit"], "0 is 'Great_Tit'", "2 'great-tit'"),
        (["a cat", "b", "c"], ["b", "c", "ACat"], "class 0 is 'a cat'", "class 2 'ACat'"),
    ],
)
def test_a_teacher_with_some_classes_at_other_places_is_refused(
    tmp_path, names, labels, here, there
):
    model = timm.create_model("gld_wrn16_1", num_classes=3)
    folder = f"local-dir:{save_pretrained(model, tmp_path / 'model', label_names=names)}"
    with pytest.raises(ModelError, match=rf"^teacher .*{here} to it, and .*{there} to the dataset"):
        create_frozen(folder, torch.device("cpu"), label_names=labels, role="teacher")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["Ant", "b_e e", "cat"], ["ant", "bee", "Cat"]),  # spelling alone
        (["ant", "bee", "cat"], ["ant", "bee", "dog"]),
        (["aves", "felis", "canis"], ["bird", "cat", "dog"]),  # other words
        (["crane", "owl", "crane"], ["crane", "eagle", "crane"]),  # a bird and a machine
        (["0", "1", "2"], ["1", "2", "3"]),
        (["0", "1", "2"], ["bird", "1", "0"]),
    ],
)
def test_names_that_no_class_tells_apart_are_taken(tmp_path, names, labels):
    model = timm.create_model("gld_wrn16_1", num_classes=3)
    folder = f"local-dir:{save_pretrained(model, tmp_path / 'model', label_names=names)}"
    create_frozen(folder, torch.device("cpu"), label_names=labels)


def test_a_batch_of_one_that_batch_norm_cannot_take_is_refused(tiny_dataset, tmp_path, distill):
    options = ["--student", "gld_resnet18", "--batch_size", 1, "--image_size", 32]
    output = distill(
        *SMALL_RUN, "--dataset", tiny_dataset, "--run", tmp_path / "run", *options, fails=True
    )
    assert "batch_size=1 leaves a process one image, on which student 'gld_re" in output
    assert "use batch_size=2 or more" in output
    assert not (tmp_path / "run").exists()


def test_a_look_at_one_image_leaves_the_run_as_it_was():
    """Neither statistics nor draws move, and maps above 1x1 give batch norm enough."""
    model = timm.create_model("gld_resnet20", num_classes=4, drop_rate=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_lone_image(model, torch.rand(1, 3, 32, 32), name="x", batch_size=2, processes=2)
    torch.set_rng_state(state)
    torch.rand(1, 3, 32, 32)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    check_lone_image(model, torch.rand(1, 3, 32, 32), name="x", batch_size=2, processes=2)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    tail = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3))
    message = r"batch_size=2 leaves a process one image.*use batch_size=4 or more"
    with pytest.raises(ModelError, match=message):
        check_lone_image(tail, torch.rand(1, 3, 32, 32), name="x", batch_size=2, processes=2)


def test_a_frozen_batch_norm_takes_one_image(tmp_path):
    """Of a student whose classifier alone learns, statistics stay as they are."""
    model = timm.create_model("gld_resnet18", num_classes=4)
    folder = save_pretrained(model, tmp_path / "model", label_names=list("abcd"))
    machine = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    options = dict(student=f"local-dir:{folder}", dataset="x", batch_size=1, image_size=32)
    recipe = Recipe(**options, teacher=None, finetune="classifier")
    models = build_models(recipe, list("abcd"), machine)
    assert not any(module.training for module in models.network.modules())
    with pytest.raises(ModelError, match="batch_size=1 leaves a process one image"):
        build_models(replace(recipe, finetune="all"), list("abcd"), machine)


@pytest.mark.slow
def test_a_folder_of_photographs_is_taught_by_one_command(rows, tmp_path, distill):
    """Plain class folders, a teacher of other classes, and nothing else said."""
    names = FEATURES["fine_label"].names
    for number, (image, label) in enumerate(
        zip(rows["train"]["img"], rows["train"]["fine_label"], strict=True)
    ):
        place = tmp_path / "photos" / names[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(image["bytes"])
    teacher = timm.create_model("mobilenetv3_small_050", num_classes=7)
    save_pretrained(teacher, tmp_path / "teacher")
    options = ["--teacher", f"local-dir:{tmp_path / 'teacher'}", "--teacher_head", "fit"]
    options += ["--student", "gld_wrn16_1", "--dataset", tmp_path / "photos"]
    # what a test can wait for
    options += ["--epochs", 1, "--image_size", 32, "--batch_size", 16, "--workers", 0]
    options += ["--threads", 1, "--teacher_store", tmp_path / "store"]
    output = distill(*options, "--run", tmp_path / "run")
    told = [
        "options that are not given are those of recipe photos",
        "64 training and 16 test images",
        "fitting a linear head",
        "its head fitted to 64 training images",
        "teacher's store",
        "0 of 10 views complete",
        "student gld_wrn16_1 on 32x32 images, pretrained",
        "view 1 of 10 is kept",
    ]
    for words in told:
        assert words in output
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert (recipe.crop, recipe.schedule, recipe.teacher_size) == ("resized", "cosine", "own")
    distill(*options, "--run", tmp_path / "run", "--resume")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dataset", "FOLDER", "--teacher_head", "fit"], True),
        (["--dataset=FOLDER", "--teacher_head=none"], True),
        (["--dataset", "FOLDER"], False),
        (["--dataset", "FOLDER", "--teacher_head", "fit", "--config", "quickstart"], False),
        (
            ["--dataset", str(CHECKOUT / "gld_zoo/data/cifar100_mini"), "--teacher_head", "fit"],
            False,
        ),
        (["--dataset", "uoft-cs/cifar100", "--teacher_head", "fit"], False),
        (["--teacher_head", "fit"], False),
    ],
)
def test_recipe_photos_is_for_folders_of_images_alone(tmp_path, options, expected):
    folder = tmp_path / "photos"
    folder.mkdir()
    options = [word.replace("FOLDER", str(folder)) for word in options]
    assert teaches_photographs(options) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            [],
            "the labels, the teacher's logits of whole images, the teacher's logits of 2x2 cells "
            "and the relations among all these logits",
        ),
        (["--grid", "[2,4]", "--beta", 0], "the teacher's logits of 2x2 and 4x4 cells"),
        (["--alpha", 1, "--local_weight", 0, "--beta", 0], "the teacher's logits of whole images"),
        (["--teacher", "null"], "the labels"),
        (["--teacher_head", "none", "--ce_weight", 0], "relations among the teacher's features"),
    ],
)
def test_a_run_tells_what_it_learns_from_and_for_how_long(
    student_run, tmp_path, distill, options, expected
):
    command = ["--config", student_run / "recipe.yaml", "--run", tmp_path / "run"]
    printed = distill(*command, "--max_minutes", 0, *options)
    (line,) = (line for line in printed.splitlines() if line.startswith("learning from "))
    assert line.endswith(f"{expected}: 2 epochs of 4 batches of 16 images")


@pytest.mark.slow
def test_a_run_tells_how_many_images_fill_no_batch(student_run, tmp_path, distill):
    command = ["--config", student_run / "recipe.yaml", "--run", tmp_path / "run"]
    printed = distill(*command, "--max_minutes", 0, "--batch_size", 28)
    told = "2 batches of 28 images; 8 of 64, others in each epoch, fill no batch and are left out"
    assert told in printed


def test_a_finished_run_tells_what_to_do_next(student_run, tmp_path, distill):
    *_, look, compare, publish = (student_run / "printed.txt").read_text().splitlines()
    command = compare.partition("gld-zoo distill ")[2].partition(",")[0].split()
    assert command[-1] == f"{student_run}-alone"
    printed = distill(*command[:-1], tmp_path / "alone", "--threads", 1)
    assert "learning from the labels: 2 epochs" in printed
    assert compare.endswith(f"and then gld-zoo compare {student_run}-alone {student_run}")
    assert look.endswith(
        f"gld-zoo explain IMAGE --model {student_run} -o OUT.png, or in a browser "
        f"gld-zoo demo --model {student_run}"
    )
    assert publish.endswith(f"gld-zoo export {student_run} FOLDER --push ORG/NAME")

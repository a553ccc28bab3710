"""Whatever ends a run, it goes on to the same bits, and nothing is half written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from gld_zoo.training.commands.distill import cli
from gld_zoo.training.engine.interruption import Interruption
from gld_zoo.training.engine.task import Task
from gld_zoo.training.engine.trainer import Trainer
from helpers import CHECKOUT, SMALL_RUN, STANDALONE, launch, read_lines, write_dataset


class Alone:
    """An accelerator of one process."""

    num_processes = 1
    is_local_main_process = True


def assert_same_result(run, expected):
    weights = [folder / "last" / "model.safetensors" for folder in (run, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (run, expected))
    for line, other in zip(ours, theirs, strict=True):
        for name in line:
            if "second" not in name:
                assert line[name] == pytest.approx(other[name], rel=1e-9), name


def test_a_time_limit_after_any_step_changes_no_bit(student_run, tmp_path, distill):
    run = tmp_path / "run"
    options = ["--config", student_run / "recipe.yaml", "--run", run]
    output = distill(*options, "--max_minutes", 0)
    assert "stopped by max_minutes at step 1 of epoch 1; go on with --resume" in output
    assert not (run / "summary.json").exists()
    for step in (2, 3):
        output = distill("--run", run, "--max_minutes", 0, "--resume")
        assert f"after 0 epochs and {step - 1} steps" in output
        assert f"at step {step} of epoch 1" in output
    distill(*options, "--resume")
    assert_same_result(run, student_run)


AVERAGED = ["--ema", 0.9, "--schedule", "cosine"]
MIXED = ["--mixup", 0.8, "--cutmix", 1.0, "--augment", "rand", "--workers", 0, *AVERAGED]
BUDGETS = dict(
    adamw=["--opt", "adamw", "--lr", 0.001, "--decay_norm", "false", *AVERAGED],
    lamb=["--opt", "lamb", "--lr", 0.01, "--layer_decay", 0.8],
    muon=["--opt", "muon", "--nesterov", "true", "--schedule", "rex"],
    mixed=[*MIXED, "--label_smoothing", 0.1, "--erasing", 0.25],
    clipped=["--clip_grad", 0.5, "--schedule", "linear", "--warmup_epochs", 0.5],
    alternate=["--flip", "alternate", "--cutout", 8, "--clip_grad", 0.1, "--clip_mode", "agc"],
    measured=["--measure_every", 2, "--epochs", 3],
)


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS.values(), ids=BUDGETS)
def test_whatever_is_trained_with_goes_on_to_the_same_bits_from_any_step(
    student_run, tmp_path, distill, options
):
    # two steps an epoch: the first, in mid-epoch, and the last, before the epoch is measured
    options = ["--config", student_run / "recipe.yaml", "--batch_size", 32, *options]
    distill(*options, "--run", tmp_path / "whole")
    run, resume = tmp_path / "run", []
    for _ in range(30):
        output = distill(*options, "--run", run, "--max_minutes", 0, *resume)
        if (run / "summary.json").exists():
            break
        assert "stopped by max_minutes" in output
        resume = ["--resume"]
    assert_same_result(run, tmp_path / "whole")
    summaries = [
        json.loads((each / "summary.json").read_text()) for each in (run, tmp_path / "whole")
    ]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_the_run_in_peace(
    student_run, tmp_path, distill, number, interruptible
):
    run = tmp_path / "run"
    options = ["--config", student_run / "recipe.yaml", "--run", run]
    before = signal.getsignal(number)

    def send():
        while not list(run.glob("checkpoints/epoch-00000-step-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    output = distill(*options, "--checkpoint_minutes", 0)
    thread.join()
    assert f"stopped by {number.name} at step" in output
    assert signal.getsignal(number) == before
    distill(*options, "--resume")
    assert_same_result(run, student_run)


@pytest.mark.slow
def test_a_signal_to_all_processes_spares_the_workers_that_read(
    student_run, tiny_dataset, tmp_path
):
    """As batch systems and torchrun send it."""
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--in_memory", "false", "--workers", 1]
    options += ["--epochs", 50, "--checkpoint_minutes", 0, "--run", run]
    process = subprocess.Popen(
        [sys.executable, CHECKOUT / "train" / "distill.py", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=dict(os.environ, PYTHONPATH=str(CHECKOUT)),
    )
    while not list(run.glob("checkpoints/epoch-00001-step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output


@pytest.mark.slow
def test_several_processes_stop_at_an_epochs_end_however_few_its_steps(student_run, tmp_path):
    run = tmp_path / "run"
    options = ["--config", student_run / "recipe.yaml", "--run", run, "--max_minutes", 0]
    output = launch(*options, processes=2)
    assert "stopped by max_minutes at step 4 of epoch 1; go on with --resume" in output
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_a_signal_ends_the_run_at_once(
    student_run, tmp_path, distill, number, interruptible, monkeypatch
):
    monkeypatch.setattr(Task, "introduction", lambda self: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    output = distill("--config", student_run / "recipe.yaml", "--run", tmp_path / "run")
    assert f"stopped by {number.name} before training; nothing was lost" in output
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "loader", "stream"])
def test_a_run_killed_while_an_epoch_is_measured_has_its_steps(
    rows, tmp_path, distill, kind, monkeypatch
):
    folder = write_dataset(tmp_path / "data", rows)
    options = [*SMALL_RUN, "--dataset", folder]
    if kind != "memory":
        options += ["--workers", 0, "--in_memory", "false" if kind == "loader" else "null"]
    if kind == "stream":
        options += ["--streaming", "true", "--train_images", 64]
    distill(*options, "--run", tmp_path / "whole")
    monkeypatch.setattr("gld_zoo.training.engine.interruption.BEFORE_MEASURING", 0.0)
    close_epoch, run = Trainer.close_epoch, tmp_path / "run"

    def close_first_epoch(self, epoch):
        if epoch:
            raise RuntimeError("killed")
        return close_epoch(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close_epoch", close_first_epoch)
        with pytest.raises(RuntimeError, match="killed"):
            distill(*options, "--run", run)
    output = distill(*options, "--run", run, "--resume")
    assert f"after 1 epochs and {4 if kind == 'stream' else 5} steps" in output
    assert_same_result(run, tmp_path / "whole")


@pytest.fixture
def interruptible():
    """Ctrl-C ends the program, also where the tests were started with it ignored (`nohup`, `&`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_is_not_held_back(interruptible, monkeypatch):
    with Interruption(Alone(), max_minutes=None, checkpoint_minutes=1) as interruption:
        interruption.begin()
        handler = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key, passed on by a launcher
        assert interruption.due(3) == (True, True)
        assert signal.getsignal(signal.SIGINT) == handler
        monkeypatch.setattr("gld_zoo.training.engine.interruption.ONE_KEYPRESS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_sent_again_does_not_end_the_run_before_its_checkpoint(interruptible, capfd):
    with Interruption(Alone(), max_minutes=None, checkpoint_minutes=1) as interruption:
        interruption.begin()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interruption.due(3) == (True, True)
        assert interruption.cause == "SIGTERM"
    assert "SIGTERM: ending at a checkpoint; Ctrl-C twice ends at once" in capfd.readouterr().err


@pytest.mark.slow
def test_a_batch_systems_signal_to_launcher_and_processes_writes_a_checkpoint(
    tiny_dataset, tmp_path
):
    """The launcher passes SIGTERM on to processes that have had it."""
    run = tmp_path / "run"
    command = ["torch.distributed.run", *STANDALONE, "--nproc_per_node", 2, "--"]
    command += [CHECKOUT / "train" / "distill.py"]
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--epochs", 500, "--run", run]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, [*command, *options])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=dict(os.environ, PYTHONPATH=str(CHECKOUT)),
    )
    while not list(run.glob("checkpoints/epoch-00002")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in output
    assert "go on with --resume" in output


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_its_holder(student_run, tmp_path, distill):
    run = tmp_path / "run"
    run.mkdir()
    holder = "import sys; from pathlib import Path; from gld_zoo.training.common import disk;"
    holder += "held = disk.lock(Path(sys.argv[1])); print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    options = ["--config", student_run / "recipe.yaml", "--run", run]
    output = distill(*options, fails=True)
    assert f"is in use by process {process.pid} on " in output
    assert not (run / "recipe.yaml").exists()
    process.communicate("\n")
    distill(*options, "--max_minutes", 0)
    assert (run / "recipe.yaml").exists()


@pytest.mark.slow
def test_an_unreadable_image_met_in_an_epoch_costs_no_finished_step(
    student_run, rows, tmp_path, distill
):
    columns = {key: list(column) for key, column in rows["train"].items()}
    columns["img"][37] = {"bytes": b"no image", "path": None}
    folder = write_dataset(tmp_path / "set", dict(train=columns, test=rows["test"]))
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", folder, "--in_memory", "false", "--workers", 0]
    options += ["--batch_size", 4, "--run", run]
    output = distill(*options, fails=True)
    assert "row 37 of split 'train'" in output
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = int(checkpoint.name.rpartition("-")[2])
    assert step > 0
    write_dataset(tmp_path / "set", rows)  # mended
    output = distill(*options, "--resume")
    assert f"after 0 epochs and {step} steps" in output
    distill(*options[:-1], tmp_path / "whole")
    assert_same_result(run, tmp_path / "whole")


def test_a_stream_goes_on_with_as_many_workers_alone(rows, tmp_path, distill):
    folder = write_dataset(tmp_path / "data", rows)
    options = [*SMALL_RUN, "--dataset", folder, "--streaming", "true", "--train_images", 64]
    options += ["--run", tmp_path / "run"]
    distill(*options, "--workers", 0, "--max_minutes", 0)
    output = distill(*options, "--workers", 1, "--resume", fails=True)
    assert "workers: 1 here, 0 there" in output


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(student_run, tmp_path, distill):
    """A limit on the size of files stands for the disk: the weights do not fit."""
    run = tmp_path / "run"
    options = ["--config", student_run / "recipe.yaml", "--run", run]
    distill(*options, "--max_minutes", 0)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        output = distill(*options, "--resume", fails=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: cannot write" in output
    assert "go on with --resume" in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert not list(run.rglob("*.partial"))
    distill(*options, "--resume")
    assert_same_result(run, student_run)


def test_a_file_in_the_folders_way_is_named(student_run, tmp_path, distill):
    (tmp_path / "file").write_text("")
    options = ["--config", student_run / "recipe.yaml", "--run", tmp_path / "file" / "run"]
    output = distill(*options, fails=True)
    assert "error: cannot write" in output
    assert "Not a directory" in output


def test_a_held_out_part_selects_best_and_leaves_the_test_split_to_the_end(
    tiny_dataset, tmp_path, distill
):
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--val_fraction", 0.25, "--run", run]
    output = distill(*options)
    assert "48 training and 33 test images, 16 held out" in output
    lines = read_lines(run / "metrics.jsonl")
    assert "val_top1" in lines[0]
    assert not any(name.startswith("test_") for name in lines[0])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_epoch_top1"] == max(line["val_top1"] for line in lines)
    assert summary["best_epoch_split"] == "val"
    assert {"top1", "best_top1"} <= summary.keys()
    assert (run / "best" / "model.safetensors").is_file()


def test_a_run_whose_best_is_lost_ends_all_the_same(tiny_dataset, tmp_path, distill):
    run = tmp_path / "run"
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--val_fraction", 0.25, "--run", run]
    distill(*options)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "best")
    assert "best/ is not measured" in distill(*options, "--resume")
    assert json.loads((run / "summary.json").read_text())["best_top1"] is None


def test_the_classifier_alone_is_trained_when_asked(teacher_run, tiny_dataset, tmp_path, distill):
    from safetensors.torch import load_file

    run = tmp_path / "run"
    student = ["--student", f"local-dir:{teacher_run}/last", "--finetune", "classifier"]
    output = distill(*SMALL_RUN, *student, "--dataset", tiny_dataset, "--run", run)
    assert "pretrained: top-1" in output
    before, after = (load_file(path / "last" / "model.safetensors") for path in (teacher_run, run))
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_stream_that_tells_no_counts_trains(rows, tmp_path, distill):
    unseen = write_dataset(tmp_path / "data", rows)  # what was loaded before is counted
    options = [*SMALL_RUN, "--dataset", unseen, "--streaming", "true", "--workers", 0]
    assert "set train_images" in distill(*options, "--run", tmp_path / "none", fails=True)
    output = distill(*options, "--train_images", 64, "--run", tmp_path / "run")
    assert "64 training and test images" in output
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_images_read_when_needed_train_and_resume_too(tiny_dataset, tmp_path, distill):
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--in_memory", "false", "--workers", 1]
    options += ["--crop", "resized", "--crop_pct", 0.875]
    distill(*options, "--run", tmp_path / "whole")
    run = tmp_path / "run"
    distill(*options, "--run", run, "--max_minutes", 0)
    distill(*options, "--run", run, "--resume", "--workers", 0, "--max_minutes", "null")
    assert_same_result(run, tmp_path / "whole")
    config = json.loads((run / "last" / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 0.875


def test_trackers_are_named_and_must_be_installed(tiny_dataset, tmp_path, distill, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ["--dataset", tiny_dataset, "--run", tmp_path / "run", "--trackers", "[wandb]"]
    assert "pip install wandb" in distill(*SMALL_RUN, *options, fails=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_reader_that_has_had_enough_does_not_end_the_run(student_run, tmp_path, streams):
    """As `| head -1` and `2>&1 | head -1` read."""
    run = tmp_path / "run"
    command = [CHECKOUT / "train" / "distill.py", "--config", student_run / "recipe.yaml"]
    command += ["--run", run]
    with subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if streams == "both" else subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(CHECKOUT)),
    ) as process:
        assert "64 training and 33 test images" in process.stdout.readline()
        process.stdout.close()
        error = "" if streams == "both" else process.stderr.read()
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert error.count("the run goes on without messages") == (streams == "stdout")
    assert_same_result(run, student_run)


def test_a_full_disk_under_the_messages_does_not_end_the_run(
    student_run, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    options = ["--config", student_run / "recipe.yaml", "--run", run, "--max_minutes", 0]
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        cli([str(option) for option in options])
    assert list((run / "checkpoints").iterdir())
    assert "No space left on device); the run goes on" in capsys.readouterr().err

"""What only a GPU can show: `pytest -m gpu`; and what is told of a full one.

The other tests hold Accelerate to the CPU (`conftest`); those marked here let go of that.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from torch._dynamo.utils import counters

from gld_zoo.training.build.create import GlobalOnly, resolve_data_config
from gld_zoo.training.common.devices import set_up_device
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Share
from gld_zoo.training.data.loaders import load_data
from gld_zoo.training.data.sources import open_source
from gld_zoo.training.engine.optimizers import optimizer_state
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller
from helpers import CHECKOUT, SMALL_RUN, write_dataset

NEVER = SimpleNamespace(due=lambda step, last: (False, False))  # an Interruption
STEPS = 50  # of an epoch of `longer_dataset`
HUGE = 2.0**40  # a loss scale under which gradients of any use are infinite in float16


def on_gpu(test):
    reason = "torch finds no CUDA GPU here, and this is true or false on one alone"
    test = pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test)
    return pytest.mark.timeout(900)(pytest.mark.gpu(test))


@pytest.fixture(scope="module")
def longer_dataset(tmp_path_factory, rows):
    """The 80 training images ten times over: 50 steps of 16."""
    train = {key: column * 10 for key, column in rows["train"].items()}
    return write_dataset(tmp_path_factory.mktemp("longer"), dict(rows, train=train))


@pytest.fixture
def build(longer_dataset, teacher_run, tmp_path, monkeypatch):
    """Build a trainer on the GPU as a run does, up to its first step; distilled unless told."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")

    def build(name="run", *, precision="no", handlers=(), **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            cpu=False, mixed_precision=precision, kwargs_handlers=list(handlers)
        )
        assert accelerator.device.type == "cuda"
        set_up_device(accelerator, None)
        usual = dict(student="gld_wrn16_1", teacher=f"local-dir:{teacher_run}/last", lr=0.05)
        usual.update(dataset=str(longer_dataset), batch_size=16, epochs=4)
        recipe = Recipe(**dict(usual, **options))
        run = RunFolder(tmp_path / name, recipe, resume=False)
        trainer = Trainer(Distiller(recipe, accelerator), run)
        assert {weight.device.type for weight in trainer.task.student.parameters()} == {"cuda"}
        trainer.task.prepare(run.path)  # from here on a teacher is in the run's precision
        trainer.task.set_training_mode()
        return trainer

    yield build
    AcceleratorState._reset_state(reset_partial_state=True)


def watch(trainer, look):
    """Return a list that grows by what `look` makes of each step's terms."""
    step, seen = trainer.step, []

    def watched(*batch):
        terms, others = step(*batch)
        seen.append(look(terms))
        return terms, others

    trainer.step = watched
    return seen


@contextlib.contextmanager
def waiting(mode):
    """Let what waits for the GPU pass ("default") or raise ("error")."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


MIXED = dict(ema=0.99, clip_grad=1.0, mixup=0.2, cutmix=1.0, label_smoothing=0.1)


@on_gpu
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(MIXED, id="distilled"),
        pytest.param(dict(MIXED, teacher=None), id="labels"),
        pytest.param(dict(batch_size=4), id="plain-relation"),  # 20 rows of 4 classes
        pytest.param(dict(clip_grad=0.01, clip_mode="agc", disagreement=2.0), id="agc"),
        pytest.param(dict(opt="adamw", lr=0.001), id="adamw"),
        pytest.param(dict(cutout=8), id="cutout"),
        pytest.param(dict(in_memory=False, workers=2), id="pinned"),
    ],
)
def test_no_step_waits_for_the_gpu(build, options):
    """From the second step on; what looks at the loss every so many steps may wait."""
    trainer = build(**options)
    check, modes = (
        trainer.state.totals.check,
        watch(trainer, lambda _: torch.cuda.get_sync_debug_mode()),
    )

    def check_and_wait(step, epoch):
        with waiting("default"):
            check(step, epoch)

    def forbid(step, last):
        torch.cuda.set_sync_debug_mode("error")
        return False, False

    trainer.state.totals.check = check_and_wait
    with waiting("default"):
        trainer.train_one_epoch(0, SimpleNamespace(due=forbid))
        with pytest.raises(RuntimeError, match="synchroniz"):  # so that it is known to be seen
            trainer.task.student.fc.bias.sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert modes.count(2) == len(modes) - 1 >= STEPS - 1  # 2 is "error"
    assert trainer.state.totals.means()["loss"] > 0


@on_gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("distilled", [True, False])
def test_two_hundred_steps_come_out_twice_to_the_same_bits(build, precision, distilled):
    options = {} if distilled else dict(teacher=None)
    weights = []
    for name in ("first", "second"):
        trainer = build(name, precision=precision, **options)
        losses = watch(trainer, lambda terms: terms["loss"].detach().clone())
        for epoch in range(4):
            trainer.train_one_epoch(epoch, NEVER)
        assert len(losses) == 200
        weights.append({"losses": torch.stack(losses), **trainer.task.student.state_dict()})
    first, second = weights
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def begin(*options, precision):
    """Start a run of its own as a user with a GPU does."""
    environment = dict(os.environ, PYTHONPATH=str(CHECKOUT), ACCELERATE_MIXED_PRECISION=precision)
    environment.pop("ACCELERATE_USE_CPU", None)
    return subprocess.Popen(
        [sys.executable, CHECKOUT / "train" / "distill.py", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def end(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_killed_run_goes_on_to_the_same_bits(longer_dataset, teacher_run, tmp_path, precision):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*SMALL_RUN, "--teacher", f"local-dir:{teacher_run}/last"]
    options += ["--dataset", longer_dataset, "--epochs", 3]
    end(begin(*options, "--run", whole, precision=precision))
    often = [*options, "--checkpoint_minutes", 0, "--run", run]
    process = begin(*often, precision=precision)
    while not list(run.glob("checkpoints/epoch-00001-step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert "after 1 epochs and " in end(begin(*often, "--resume", precision=precision))
    environment = json.loads((run / "env.json").read_text())
    assert environment["device"] == torch.cuda.get_device_name()
    assert environment["mixed_precision"] == precision
    weights = [folder / "last" / "model.safetensors" for folder in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# Compiled kernels add up in another order, and training enlarges that: at a rate of 0.05 weights
# off by 1e-6 give losses 4 % off within ten steps, eager as they are. At 1e-4 it is 2e-4, while the
# steps move the loss by 40 %. bf16 keeps 8 bits, and what is fused is not rounded in between, which
# came to 6e-3 on a CPU.
@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("distilled", [True, False])
def test_compiled_steps_are_whole_graphs_with_the_losses_of_eager_ones(
    build, precision, tolerance, distilled
):
    torch._dynamo.reset()
    counters.clear()
    options, losses = dict(precision=precision, lr=1e-4), []
    if not distilled:
        options.update(teacher=None)
    for compiled in (False, True):
        trainer = build(str(compiled), compile=compiled, **options)
        losses.append(watch(trainer, lambda terms: terms["loss"].detach().clone()))
        trainer.train_one_epoch(0, NEVER)
        assert bool(counters["frames"]["ok"]) == compiled
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
    eager, found = (torch.stack(values[:10]) for values in losses)
    torch.testing.assert_close(found, eager, rtol=tolerance, atol=0)


@on_gpu
@pytest.mark.parametrize(
    "options", [dict(), dict(clip_grad=1.0), dict(opt="adamw", lr=0.001)], ids=str
)
def test_fp16_skips_what_overflows_and_trains_on(build, options):
    options = dict(options, precision="fp16", handlers=[GradScalerKwargs(init_scale=HUGE)])
    trainer = build(**options)
    scaler, fc = trainer.accelerator.scaler, trainer.task.student.fc.weight
    before = fc.detach().clone()
    losses = watch(trainer, lambda terms: terms["loss"].detach().clone())
    skipped = watch(trainer, lambda _: trainer.optimizer.step_was_skipped)
    weights = watch(trainer, lambda _: fc.detach().clone())
    trainer.train_one_epoch(0, NEVER)
    assert skipped[0]
    assert torch.equal(weights[0], before)
    assert not skipped[-1]
    assert not torch.equal(weights[-1], before)
    scale = scaler.get_scale()
    assert scale == HUGE * 0.5 ** sum(skipped)  # it doubles after 2000 good steps alone
    assert torch.stack(losses).isfinite().all()
    tensors, _ = optimizer_state(trainer.optimizer, trainer.task.student)
    assert tensors
    assert [name for name, value in tensors.items() if not value.isfinite().all()] == []

    trainer.state.save(0, STEPS)
    resumed = build("resumed", **options)
    assert resumed.accelerator.scaler.get_scale() == HUGE
    resumed.run.checkpoints = trainer.run.checkpoints
    resumed.restore()
    assert resumed.accelerator.scaler.get_scale() == scale


@on_gpu
def test_pinned_batches_reach_the_gpu_as_those_of_the_cpu(longer_dataset):
    recipe = Recipe(
        student="gld_wrn16_1",
        dataset=str(longer_dataset),
        batch_size=16,
        in_memory=False,
        workers=2,
    )
    config = resolve_data_config(timm.create_model(recipe.student), None)
    cpu, gpu = (
        load_data(open_source(recipe), recipe, config, torch.device(name), Share())
        for name in ("cpu", "cuda")
    )
    assert all(part.is_pinned() for part in next(iter(gpu.train.loader)))
    for theirs, ours in ((cpu.train.epoch(1), gpu.train.epoch(1)), (cpu.test, gpu.test)):
        for (images, target), (found, labels) in zip(theirs, ours, strict=True):
            assert {found.device.type, labels.device.type} == {"cuda"}
            assert torch.equal(labels.cpu(), target)
            # a multiply-add may be rounded once or twice; neighbouring pixels lie 0.01 apart
            torch.testing.assert_close(found.cpu(), images, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("owner", "name"), [(Trainer, "step"), (GlobalOnly, "forward")])
def test_a_full_gpu_is_told_as_such(tiny_dataset, tmp_path, distill, monkeypatch, owner, name):
    """In a step, or already in the trial that refuses what a model does not take."""

    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(owner, name, fill)
    options = [*SMALL_RUN, "--dataset", tiny_dataset, "--run", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        distill(*options)
    (line,) = str(stop.value.code).splitlines()
    assert "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.)" in line
    assert "batch_size" in line
    assert "another image_size" not in line

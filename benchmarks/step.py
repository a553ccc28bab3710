"""Time a training step of ours against a naive port's and against a floor, in one process.

    python benchmarks/step.py --setup a --threads 2 --out step.json
    python benchmarks/step.py --setup a --bf16 --dataset uoft-cs/cifar100
    python benchmarks/step.py --setup a --device cuda --bf16 --compile

naive  a straightforward port, in float32: the teacher in the autograd graph with its gradient, the
       models as they are, the relation through N x N matrices, a plain SGD, the loss read each step
ours   the step of the trainer's loop, its sums for the log included, on a batch that is
       there; in bfloat16 with `--bf16`, compiled (on a GPU to CUDA graphs) with `--compile`
floor  student forward, backward and SGD with cross-entropy, and the teacher's forward: channels
       last, folded teacher, no other loss and no data, in the precision of ours

Rounds take the variants in rotated order; ratios are medians over rounds. Peak memory is that of a
process that runs a variant alone. `--dataset` also trains an epoch of it, data, augmentation and
logging included and evaluation not, and gives its time over that of its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from measuring import interleave, peak_memory, ratio
from torch import nn

from gld_zoo.distillation.folding import fold_batch_norm
from gld_zoo.distillation.teacher import Teacher
from gld_zoo.hub import save_pretrained
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.interruption import CHECK_EVERY, Interruption
from gld_zoo.training.engine.totals import Totals
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller

SETUPS = dict(
    a=("gld_resnet110", "gld_resnet20"),
    b=("gld_wrn16_2", "gld_wrn16_1"),
    c=("gld_wrn22_4", "gld_wrn16_2"),
    d=("gld_wrn16_4", "gld_resnet32"),
)
VARIANTS = ("naive", "ours", "floor")
BUNDLED = "gld_zoo/data/cifar100_mini"
Step = Callable[[], None]


def inputs(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[B, 3, 32, 32]`, channels last, and labels `[B]`."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32).to(device, memory_format=torch.channels_last)
    return images, torch.randint(100, (batch,)).to(device)


def naive_step(setup: str, batch: int, device: torch.device) -> Step:
    """Return the step of a port that thinks of nothing but the equations."""
    teacher, student = (
        timm.create_model(name, num_classes=100).to(device) for name in SETUPS[setup]
    )
    teacher.eval()
    images, target = inputs(batch, device)
    images = images.contiguous()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=False
    )

    def logits(model: nn.Module) -> torch.Tensor:
        features = model.forward_features(images)
        cells = F.adaptive_avg_pool2d(features, 2).flatten(2)
        rows = torch.cat([features.mean((2, 3)).unsqueeze(2), cells], 2).transpose(1, 2)
        return model.fc(rows)

    def divergence(student_rows: torch.Tensor, teacher_rows: torch.Tensor) -> torch.Tensor:
        wanted = (teacher_rows / teacher_rows.std(-1, keepdim=True)).log_softmax(-1)
        given = (student_rows / student_rows.std(-1, keepdim=True)).log_softmax(-1)
        return F.kl_div(given, wanted, reduction="batchmean", log_target=True)

    def distances(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.flatten(0, 1)
        squares = rows.square().sum(1)
        squared = (squares[:, None] + squares - 2 * rows @ rows.T).clamp(min=0)
        return squared / squared.norm(dim=1, keepdim=True)

    def step() -> None:
        optimizer.zero_grad()
        ours, theirs = logits(student), logits(teacher)
        loss = 0.3 * F.cross_entropy(ours[:, 0], target)
        loss = loss + 0.7 * divergence(ours[:, 0], theirs[:, 0])
        for cell in range(1, ours.shape[1]):
            loss = loss + divergence(ours[:, cell], theirs[:, cell])
        loss = loss + 500 * (distances(theirs) - distances(ours)).square().mean()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_step(trainer: Trainer) -> Step:
    """Return the trainer's step and what it does beside it in an epoch."""
    images, target = inputs(trainer.recipe.batch_size, trainer.accelerator.device)
    trainer.task.network.train()

    def step() -> None:
        trainer.state.totals.add(*trainer.step(images, target))
        if trainer.state.totals.steps % CHECK_EVERY == 0:
            trainer.state.totals.check(trainer.state.totals.steps, 0)

    return step


def floor_step(setup: str, batch: int, accelerator: Accelerator) -> Step:
    """Return a step without the loss, in the accelerator's precision."""
    device = accelerator.device
    model, student = (
        timm.create_model(name, num_classes=100).to(device, memory_format=torch.channels_last)
        for name in SETUPS[setup]
    )
    model.eval().requires_grad_(False)
    model = fold_batch_norm(model, (3, 32, 32))
    teacher = Teacher(model, 2, student.default_cfg["mean"], student.default_cfg["std"])
    teacher(inputs(batch, device)[0])  # which shows it the form of its map
    teacher.keep_in(torch.bfloat16 if accelerator.mixed_precision == "bf16" else None)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    images, target = inputs(batch, device)

    def step() -> None:
        with accelerator.autocast():
            teacher.classify(images)
            total = F.cross_entropy(student(images).float(), target)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_trainer(options: argparse.Namespace, folder: Path, accelerator: Accelerator) -> Trainer:
    """Return a trainer of a setup, its teacher of random weights."""
    teacher, student = SETUPS[options.setup]
    save_pretrained(timm.create_model(teacher, num_classes=100), folder / "teacher")
    recipe = Recipe(
        student=student,
        teacher=f"local-dir:{folder / 'teacher'}",
        dataset=options.dataset or BUNDLED,
        batch_size=options.batch,
        epochs=1,
        threads=options.threads,
        compile=options.compile,
    )
    trainer = Trainer(
        Distiller(recipe, accelerator), RunFolder(folder / "run", recipe, resume=False)
    )
    trainer.task.prepare(trainer.run.path)  # after which the teacher only teaches
    return trainer


def epoch_ratio(trainer: Trainer) -> float:
    """Return the seconds of the trainer's epoch over its steps times those of `our_step`."""
    step = dict(ours=in_turn(our_step(trainer), trainer.accelerator.device))
    times = interleave(step, rounds=30)["ours"]
    trainer.state.totals = Totals(trainer.accelerator.device)
    with Interruption(
        trainer.accelerator, max_minutes=None, checkpoint_minutes=1e9
    ) as interruption:
        trainer.train_one_epoch(0, interruption)
    seconds, steps = trainer.state.totals.seconds, trainer.state.totals.steps
    times += interleave(step, rounds=30)["ours"]  # machines get faster and slower
    repeats = repeats_on(trainer.accelerator.device)
    return round(seconds / (steps * statistics.mean(times) / repeats / 1000), 3)


def repeats_on(device: torch.device) -> int:
    """Return how many steps are timed as one: a GPU's queue up, as they do in training."""
    return 20 if device.type == "cuda" else 1


def in_turn(step: Step, device: torch.device) -> Step:
    """Return what takes a few steps and waits for the last."""
    if device.type != "cuda":
        return step

    def steps() -> None:
        for _ in range(repeats_on(device)):
            step()
        torch.cuda.synchronize()

    return steps


def build(name: str, options: argparse.Namespace, folder: Path, accelerator: Accelerator) -> Step:
    """Return a variant's step."""
    device = accelerator.device
    if name == "naive":
        return in_turn(naive_step(options.setup, options.batch, device), device)
    if name == "floor":
        return in_turn(floor_step(options.setup, options.batch, accelerator), device)
    return in_turn(our_step(build_trainer(options, folder, accelerator)), device)


def measure(options: argparse.Namespace, folder: Path, accelerator: Accelerator) -> dict:
    """Return what was measured of one setup."""
    device = accelerator.device
    steps = {name: build(name, options, folder, accelerator) for name in VARIANTS}
    times = interleave(steps, rounds=options.rounds)
    repeats = repeats_on(device)
    result: dict = dict(setup=options.setup, batch=options.batch, device=device.type)
    result.update(threads=options.threads, precision="bf16" if options.bf16 else "float32")
    result["ms"] = {
        name: round(statistics.median(ms) / repeats, 2 if repeats > 1 else 1)
        for name, ms in times.items()
    }
    result["naive / ours"] = ratio(times, "naive", "ours")
    result["ours / floor"] = ratio(times, "ours", "floor")
    if options.dataset:
        (folder / "epoch").mkdir()
        trainer = build_trainer(options, folder / "epoch", accelerator)
        result["epoch / its steps"] = epoch_ratio(trainer)
    if not options.no_memory:
        result["peak MB"] = {name: round(alone(name, options)) for name in VARIANTS}
    return result


def alone(name: str, options: argparse.Namespace) -> float:
    """Return the peak memory, in MB, of a process that runs one variant."""
    command = [sys.executable, __file__, "--setup", options.setup, "--device", options.device]
    command += ["--batch", str(options.batch), "--threads", str(options.threads)]
    command += ["--bf16"] * options.bf16 + ["--compile"] * options.compile + ["--memory", name]
    return float(subprocess.check_output(command, text=True))


def main() -> None:
    """Measure one setup in one precision: Accelerate's state is the process's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", choices=SETUPS, default="a", help="of the paper")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--bf16", action="store_true", help="ours and floor in bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--dataset", help="train an epoch of it too: hub id or folder")
    parser.add_argument("--no_memory", action="store_true", help="time alone")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(
        cpu=options.device == "cpu", mixed_precision="bf16" if options.bf16 else "no"
    )
    with tempfile.TemporaryDirectory() as name:
        if options.memory:
            step = build(options.memory, options, Path(name), accelerator)
            for _ in range(3):
                step()
            on_gpu = options.device == "cuda"
            print(torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_memory())
            return
        result = measure(options, Path(name), accelerator)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

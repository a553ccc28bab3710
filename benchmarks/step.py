"""Time a training step of ours against a naive port's and against a floor, in one process.

    python benchmarks/step.py --setup a --threads 2 --out step.json

naive  a straightforward port, in float32: the teacher in the autograd graph with its gradient, the
       models as they are, the relation through N x N matrices, a plain SGD, the loss read each step
ours   what train/distill.py runs, on a batch that is there
floor  student forward, backward and SGD with cross-entropy, and the teacher's forward: channels
       last, folded teacher, no other loss and no data

Rounds take the variants in rotated order; ratios are medians over rounds. Peak memory is that of a
process that runs a variant alone. `--dataset` also trains an epoch with the trainer, in bfloat16
with `--bf16`, data, augmentation and logging included and evaluation not, and gives its time over
that of its steps.
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
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train"))

from accelerate import Accelerator
from measuring import interleave, peak_memory, ratio

import gld_zoo
from gld_zoo.hub import save_pretrained
from interruption import Interruption
from models import Teacher
from recipe import Recipe
from run_folder import RunFolder
from trainer import Trainer

SETUPS = dict(
    a=("gld_resnet110", "gld_resnet20"),
    b=("gld_wrn16_2", "gld_wrn16_1"),
    c=("gld_wrn22_4", "gld_wrn16_2"),
    d=("gld_wrn16_4", "gld_resnet32"),
)
Step = Callable[[], None]


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[B, 3, 32, 32]`, channels last, and labels `[B]`."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32)
    return images.to(memory_format=torch.channels_last), torch.randint(100, (batch,))


def naive_step(setup: str, batch: int) -> Step:
    """Return the step of a port that thinks of nothing but the equations."""
    teacher, student = (timm.create_model(name, num_classes=100) for name in SETUPS[setup])
    teacher.eval()
    images, target = inputs(batch)
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


def our_step(setup: str, batch: int, *, bf16: bool, loss: bool = True) -> Step:
    """Return the trainer's step, or without the loss the floor's."""
    teacher_name, student_name = SETUPS[setup]
    student = timm.create_model(student_name, num_classes=100).to(memory_format=torch.channels_last)
    model = timm.create_model(teacher_name, num_classes=100).eval().requires_grad_(False)
    teacher = Teacher(model, 2, student.default_cfg["mean"], student.default_cfg["std"])
    network = gld_zoo.GlobalLocal(student)
    criterion = gld_zoo.GLDLoss(global_batch=True)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    images, target = inputs(batch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if loss:
                logits = network(images)
                wanted = teacher(images)
                total = criterion(logits, wanted, target)["loss"]
            else:
                with torch.no_grad():
                    teacher.logits.model(images)
                total = F.cross_entropy(student(images).float(), target)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def epoch_ratio(setup: str, batch: int, *, bf16: bool, dataset: str) -> float:
    """Return the seconds of the trainer's epoch over its steps times those of `our_step`."""
    teacher, student = SETUPS[setup]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(timm.create_model(teacher, num_classes=100), Path(folder, "teacher"))
        threads = torch.get_num_threads()
        recipe = Recipe(
            student=student,
            teacher=f"local-dir:{folder}/teacher",
            dataset=dataset,
            batch_size=batch,
            epochs=1,
            threads=threads,
        )
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
        run = RunFolder(Path(folder, "run"), recipe, resume=False)
        trainer = Trainer(recipe, run, accelerator)
        step = dict(ours=our_step(setup, batch, bf16=bf16))
        times = interleave(step, rounds=30)["ours"]
        with Interruption(accelerator, max_minutes=None, checkpoint_minutes=1e9) as interruption:
            trainer.train_one_epoch(0, interruption)
        times += interleave(step, rounds=30)["ours"]  # machines get faster and slower
        steps = trainer.totals.steps
    return round(trainer.totals.seconds / (steps * statistics.mean(times) / 1000), 3)


def variants(setup: str, batch: int, bf16: bool) -> dict[str, Callable[[], Step]]:
    """Return what builds each variant's step."""
    built = dict(
        naive=lambda: naive_step(setup, batch),
        ours=lambda: our_step(setup, batch, bf16=False),
        floor=lambda: our_step(setup, batch, bf16=False, loss=False),
    )
    if bf16:
        built["ours bf16"] = lambda: our_step(setup, batch, bf16=True)
        built["floor bf16"] = lambda: our_step(setup, batch, bf16=True, loss=False)
    return built


def main() -> None:
    """Measure one setup."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setup", choices=SETUPS, default="a", help="of the paper")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="also under bfloat16 autocast")
    parser.add_argument("--dataset", help="train an epoch of it too: hub id or folder")
    parser.add_argument("--no_memory", action="store_true", help="time alone")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    built = variants(options.setup, options.batch, options.bf16 or bool(options.memory))
    if options.memory:
        step = built[options.memory]()
        for _ in range(3):
            step()
        print(peak_memory())
        return
    times = interleave({name: build() for name, build in built.items()}, rounds=options.rounds)
    result: dict = dict(setup=options.setup, batch=options.batch, threads=options.threads)
    result["ms"] = {name: round(statistics.median(ms), 1) for name, ms in times.items()}
    result["naive / ours"] = ratio(times, "naive", "ours")
    result["ours / floor"] = ratio(times, "ours", "floor")
    if options.bf16:
        result["naive / ours bf16"] = ratio(times, "naive", "ours bf16")
        result["ours bf16 / floor bf16"] = ratio(times, "ours bf16", "floor bf16")
    if options.dataset:
        # one precision a process: Accelerate's state is the process's
        result["epoch / its steps" + (" bf16" if options.bf16 else "")] = epoch_ratio(
            options.setup, options.batch, bf16=options.bf16, dataset=options.dataset
        )
    if not options.no_memory:
        command = [sys.executable, __file__, "--setup", options.setup]
        command += ["--batch", str(options.batch), "--threads", str(options.threads), "--memory"]
        result["peak MB"] = {
            name: round(float(subprocess.check_output([*command, name], text=True)))
            for name in built
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Distil a student from a teacher; without one, train on labels alone (a teacher, a baseline).

    accelerate launch --cpu train/distill.py --config train/recipes/quickstart.yaml
    accelerate launch --mixed_precision bf16 train/distill.py --config FILE --seed 1
    accelerate launch --num_processes 4 train/distill.py --config FILE --resume
    torchrun --nproc_per_node 2 -- train/distill.py --config FILE --run DIR  # two CPU processes

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from curves import measured_split
from disk import DiskError
from interruption import Interruption, Stopped
from models import ModelError
from recipe import Recipe, parse_command
from run_folder import RunError, RunFolder
from sources import DataError
from totals import NonFiniteLossError
from trainer import Trainer


def main(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """Run a recipe in a folder and tell what came of it."""
    check_trackers(recipe.trackers)
    accelerator = Accelerator(log_with=list(recipe.trackers) or None, project_dir=folder)
    check_accelerator(accelerator)
    set_up_device(accelerator, recipe.threads)
    say = accelerator.print
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # nobody watches
    run = RunFolder(folder, recipe, resume=resume)
    if run.finished:
        say(f"{folder} holds a finished run; nothing to resume")
        return
    with Interruption(
        accelerator,
        max_minutes=recipe.max_minutes,
        checkpoint_minutes=recipe.checkpoint_minutes,
    ) as interruption:
        train(recipe, run, accelerator, interruption, resume=resume)
    accelerator.end_training()


def train(
    recipe: Recipe,
    run: RunFolder,
    accelerator: Accelerator,
    interruption: Interruption,
    *,
    resume: bool,
) -> None:
    """Train, tell of it, and leave the finished run in its folder."""
    say = accelerator.print
    trainer = Trainer(recipe, run, accelerator)
    run.start(accelerator)
    if recipe.trackers:
        accelerator.init_trackers("gld_zoo", config=flat_options(recipe))
    data = trainer.data
    held = f", {data.val.count:,} held out" if data.val else ""
    tests = "" if data.test.count is None else f"{data.test.count:,} "
    say(f"{recipe.dataset}: {data.train.count:,} training and {tests}test images{held}")
    teacher_top1 = trainer.measure_teacher()
    if teacher_top1 is not None:
        say(f"teacher {recipe.teacher}: top-1 {teacher_top1:.2f} %")
    if resume:
        trainer.restore()
    origin = describe_origin(trainer, recipe)
    before = trainer.measure(data.val or data.test)["top1"]
    say(f"student {recipe.student}, {origin}: top-1 {before:.2f} %")
    try:
        trainer.fit(lambda line: say(describe(line, recipe.epochs)), interruption)
    except Stopped as stopped:
        say(f"{stopped}; go on with --resume")
        return
    summary = trainer.finish(teacher_top1)
    if teacher_top1 is not None:
        say(f"teacher {teacher_top1:.2f} %")
    say(f"student {before:.2f} % before ({origin}), {summary['top1']:.2f} % after")
    say(
        f"run folder {run.path}, with curves.png; the student: import timm, gld_zoo; "
        f"timm.create_model('local-dir:{run.path}/last', pretrained=True)"
    )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, which Accelerate would leave out without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise RunError(f"trackers: {name} is not installed; pip install {name}")


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what Accelerate can be configured to and this loop cannot do."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise RunError(
            f"gradient accumulation over {steps} steps is set, but the relation spans a whole "
            "batch and does not add up over parts; set it to 1 and choose batch_size instead"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise RunError(
            f"distributed type {accelerator.distributed_type.value} is not supported; use plain "
            "data parallelism (accelerate config)"
        )


def set_up_device(accelerator: Accelerator, threads: int | None) -> None:
    """Use the machine's cores, and on a GPU only kernels that repeat their results."""
    if accelerator.device.type == "cpu":
        # launchers count physical cores or allow one thread, so their choice is not taken over
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, cores // here))
    elif accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def flat_options(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's options as trackers take them: numbers, words and truth values."""
    options = dataclasses.asdict(recipe)
    plain = (int, float, str, bool)
    return {
        name: value if isinstance(value, plain) else str(value) for name, value in options.items()
    }


def describe_origin(trainer: Trainer, recipe: Recipe) -> str:
    """Tell what weights the student starts from."""
    epoch, step = trainer.position
    if epoch or step:
        return f"after {epoch} epochs" + (f" and {step} steps" if step else "")
    return "pretrained" if recipe.finetune else "random weights"


def describe(line: dict[str, Any], epochs: int) -> str:
    """Return an epoch's metrics as one line for people."""
    terms = " ".join(
        f"{name.removeprefix('loss_')} {line[name]:.3f}" for name in line if name.startswith("loss")
    )
    minutes = line["seconds"] * (epochs - line["epoch"]) / 60
    split = measured_split(line)
    return (
        f"epoch {line['epoch']}/{epochs}  top-1 {split} {line[f'{split}_top1']:.2f} "
        f"train {line['train_top1']:.2f}  "
        f"{terms}  lr {line['lr']:g}  {line['images_per_second']:.0f} images/s  "
        f"{minutes:.1f} min left"
    )


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    command = parse_command(__doc__.splitlines()[0], arguments)
    try:
        main(command.recipe, command.run, resume=command.resume)
    except DiskError as error:
        sys.exit(f"error: {error}; mend the disk and go on with --resume, or name another --run")
    except (DataError, ModelError, NonFiniteLossError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()

"""From a command line to a run: devices, folder, messages and the end, whatever is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, InitProcessGroupKwargs

from curves import measured_split
from disk import DiskError
from gld_zoo.output import end, printing
from interruption import Interruption, Stopped
from models import ModelError, forbid_tf32
from options import Command, Options, parse_command
from rows import DataError
from run_folder import RunError, RunFolder
from totals import NonFiniteLossError
from trainer import Trainer


def launch(
    kind: type[Trainer], options: type[Options], description: str, arguments: list[str] | None
) -> None:
    """Run a command line; a mistake ends the program with one line that names it.

    Args:
        kind: What trains.
        options: Its recipe's class.
        description: For `--help`.
        arguments: None takes the program's own.
    """
    with printing(failed=end):  # the help
        command = parse_command(options, description, arguments)
    with printing(failed=go_on):
        run_command(kind, command)


def go_on(error: OSError) -> None:
    """Tell that a run goes on although nobody reads its messages: its work is in its folder."""
    print(
        f"standard output takes no more ({error.strerror}); the run goes on without messages: "
        "metrics.jsonl in its folder tells of it, and Ctrl-C ends it at a checkpoint",
        file=sys.stderr,
    )


def run_command(kind: type[Trainer], command: Command[Any]) -> None:
    """Run what a command line asks for; a mistake ends the program with one line that names it."""
    try:
        run(kind, command.recipe, command.run, resume=command.resume)
    except DiskError as error:
        sys.exit(f"error: {error}; mend the disk and go on with --resume, or name another --run")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: the GPU's memory is full ({str(error).splitlines()[0]}); use a smaller "
            "batch_size or eval_batch_size, grad_checkpointing: true, --mixed_precision bf16, or "
            "in_memory: false, and go on with --resume where the recipe is the same"
        )
    except (DataError, ModelError, NonFiniteLossError, RunError) as error:
        sys.exit(f"error: {error}")


def run(kind: type[Trainer], recipe: Options, folder: Path, *, resume: bool = False) -> None:
    """Run a recipe in a folder and tell what came of it."""
    check_trackers(recipe.trackers)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else it would start no processes on CPUs
        # one machine may still download what another has
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        log_with=list(recipe.trackers) or None,
        project_dir=folder,
    )
    check_accelerator(accelerator)
    set_up_device(accelerator, recipe.threads)
    say = accelerator.print
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # nobody watches
    opened = RunFolder(folder, recipe, resume=resume)
    if opened.finished:
        say(f"{folder} holds a finished run; nothing to resume")
        return
    interruption = Interruption(
        accelerator, max_minutes=recipe.max_minutes, checkpoint_minutes=recipe.checkpoint_minutes
    )
    try:
        with interruption, contextlib.closing(kind(recipe, opened, accelerator)) as trainer:
            train(trainer, interruption, resume=resume)
    except KeyboardInterrupt:
        if interruption.begun:
            raise
        say(f"stopped by {interruption.cause} before training; nothing was lost")
    accelerator.end_training()


def train(trainer: Trainer, interruption: Interruption, *, resume: bool) -> None:
    """Train, tell of it, and leave the finished run in its folder."""
    accelerator = trainer.accelerator
    say = accelerator.print
    trainer.run.start(accelerator)
    if trainer.recipe.trackers:
        accelerator.init_trackers("gld_zoo", config=flat_options(trainer.recipe))
    if resume:
        trainer.restore()
    for line in trainer.introduction():
        say(line)
    say(trainer.measure_start())
    try:
        trainer.fit(lambda line: say(describe(line, trainer)), interruption)
    except Stopped as stopped:
        say(f"{stopped}; go on with --resume")
        return
    summary = trainer.finish()
    best = summary[f"best_epoch_{trainer.score}"]
    say(
        f"best {trainer.score_title} of an epoch, as a note: {best:.2f} % at "
        f"{summary['best_epoch']} ({summary['best_epoch_split']})"
    )
    for line in trainer.conclusion(summary):
        say(line)


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
    if accelerator.mixed_precision == "fp8":
        raise RunError("mixed precision fp8 is not supported; set bf16, fp16 or no")
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise RunError(
            f"Accelerate is set to compile by {backend.value}; unset it (accelerate config) and "
            "use --compile true, which compiles what can be and repeats its results"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise RunError(  # Accelerate would train in float32, and say fp16
            "mixed precision fp16 is for GPUs; on a CPU set bf16 or no (--mixed_precision)"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RunError(
            f"{started} processes were started, and Accelerate joins {accelerator.num_processes} "
            f"on {accelerator.device.type}; start one, or name the device (accelerate config)"
        )


def set_up_device(accelerator: Accelerator, threads: int | None) -> None:
    """Use the machine's cores, and on a GPU only kernels that repeat their results."""
    if accelerator.device.type == "cpu":
        # launchers count physical cores or allow one thread, so their choice is not taken over
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, cores // here))
        if accelerator.mixed_precision == "bf16" and emulates_bf16():
            accelerator.print(
                "this CPU has no instructions for bf16, which makes it many times slower than "
                "float32; leave --mixed_precision bf16 out"
            )
    elif accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        forbid_tf32()


def emulates_bf16() -> bool:
    """Tell whether torch's convolutions compute bf16 on this CPU without its instructions."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def flat_options(recipe: Options) -> dict[str, Any]:
    """Return a recipe's options as trackers take them: numbers, words and truth values."""
    options = dataclasses.asdict(recipe)
    plain = (int, float, str, bool)
    return {
        name: value if isinstance(value, plain) else str(value) for name, value in options.items()
    }


def describe(line: dict[str, Any], trainer: Trainer) -> str:
    """Return an epoch's metrics as one line for people."""
    terms = " ".join(
        f"{name.removeprefix('loss_')} {line[name]:.3f}" for name in line if name.startswith("loss")
    )
    epochs, score = trainer.recipe.epochs, trainer.score
    split = measured_split(trainer.run.history)
    minutes = line["seconds"] * (epochs - line["epoch"]) / 60
    shown = f"{trainer.score_title}"
    if f"{split}_{score}" in line:
        shown += f" {split} {line[f'{split}_{score}']:.2f}"
    if (raw := line.get(f"{split}_raw_{score}")) is not None:
        shown += f" (without averaging {raw:.2f})"
    if f"train_{score}" in line:
        shown += f" train {line[f'train_{score}']:.2f}"
    return (
        f"epoch {line['epoch']}/{epochs}  {shown}  "
        f"{terms}  lr {line['lr']:g}  {line['images_per_second']:.0f} images/s  "
        f"{minutes:.1f} min left"
    )

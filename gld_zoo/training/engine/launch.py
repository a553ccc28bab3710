"""From a command line to a run: devices, folder, messages and the end, whatever is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from gld_zoo.output import end, printing
from gld_zoo.training.common.devices import check_accelerator, set_up_device
from gld_zoo.training.common.errors import DiskError, RunError, TrainingError
from gld_zoo.training.config.command_line import Command, parse_command
from gld_zoo.training.config.options import Options
from gld_zoo.training.engine import telling
from gld_zoo.training.engine.interruption import Interruption, Stopped
from gld_zoo.training.engine.optimizers import check_optimizer
from gld_zoo.training.engine.task import Task
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder

Kind = Callable[[Any, Accelerator], Task]


def launch(
    kind: Kind,
    options: type[Options],
    description: str,
    arguments: list[str],
    prog: str | None,
) -> None:
    """Run a command line; a mistake ends the program with one line that names it.

    Args:
        kind: Makes what is trained of a recipe and an accelerator.
        options: Its recipe's class.
        description: For `--help`.
        arguments: The command line.
        prog: What `--help` calls the program.
    """
    with printing(failed=end):  # the help
        command = parse_command(options, description, arguments, prog)
    with printing(failed=go_on):
        run_command(kind, command)


def go_on(error: OSError) -> None:
    """Tell that a run goes on although nobody reads its messages: its work is in its folder."""
    print(
        f"standard output takes no more ({error.strerror}); the run goes on without messages: "
        "metrics.jsonl in its folder tells of it, and Ctrl-C ends it at a checkpoint",
        file=sys.stderr,
    )


def run_command(kind: Kind, command: Command[Any]) -> None:
    """Run what a command line asks for; a mistake ends the program with one line that names it."""
    remedy = "mend the disk and go on with --resume, or name another --run"
    with mistakes_told(command.recipe, remedy):
        run(kind, command.recipe, command.run, resume=command.resume)


@contextlib.contextmanager
def mistakes_told(recipe: Options, remedy: str) -> Iterator[None]:
    """End the program at a mistake, with one line that names it.

    Args:
        recipe: Whose options are ways out of a GPU that is full.
        remedy: What a line on a disk that refuses advises.
    """
    try:
        yield
    except DiskError as error:
        sys.exit(f"error: {error}; {remedy}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {full_gpu(error, recipe)}")
    except TrainingError as error:
        sys.exit(f"error: {error}")


def full_gpu(error: torch.OutOfMemoryError, recipe: Options) -> str:
    """Return what to tell of a GPU whose memory is full, with the ways out that a recipe has."""
    ways = [
        "a smaller batch_size or eval_batch_size",
        "ACCELERATE_MIXED_PRECISION=bf16 before the command",
    ]
    known = {field.name for field in recipe.fields()}
    ways += [
        f"{name}: {value}"
        for name, value in (("grad_checkpointing", "true"), ("in_memory", "false"))
        if name in known
    ]
    return (
        f"the GPU's memory is full ({str(error).splitlines()[0]}); use {', '.join(ways[:-1])} or "
        f"{ways[-1]}, and go on with --resume where the recipe is the same"
    )


def run(kind: Kind, recipe: Options, folder: Path, *, resume: bool = False) -> None:
    """Run a recipe in a folder and tell what came of it."""
    check_trackers(recipe.trackers)
    accelerator = begin(recipe, log_with=list(recipe.trackers) or None, project_dir=folder)
    say = accelerator.print
    opened = RunFolder(folder, recipe, resume=resume)
    if opened.finished:
        say(f"{folder} holds a finished run; nothing to resume")
        return
    check_optimizer(recipe)  # before the images are read, so that its mistakes cost nothing
    interruption = Interruption(
        accelerator, max_minutes=recipe.max_minutes, checkpoint_minutes=recipe.checkpoint_minutes
    )
    try:
        with (
            interruption,
            contextlib.closing(Trainer(kind(recipe, accelerator), opened)) as trainer,
        ):
            train(trainer, interruption, resume=resume)
    except KeyboardInterrupt:
        if interruption.begun:
            raise
        say(f"stopped by {interruption.cause} before training; nothing was lost")
    accelerator.end_training()


def begin(recipe: Options, **options: Any) -> Accelerator:
    """Return Accelerate's processes, set up as a recipe and its devices ask for.

    Args:
        recipe: Of which the threads count.
        **options: Accelerate's.

    Raises:
        RunError: If Accelerate is configured to what cannot be.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else it would start no processes on CPUs
        # one machine may still download what another has
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        **options,
    )
    check_accelerator(accelerator)
    set_up_device(accelerator, recipe.threads)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # nobody watches
    return accelerator


def train(trainer: Trainer, interruption: Interruption, *, resume: bool) -> None:
    """Train, tell of it, and leave the finished run in its folder."""
    task, accelerator = trainer.task, trainer.accelerator
    say = accelerator.print
    trainer.run.start(accelerator)
    if trainer.recipe.trackers:
        accelerator.init_trackers("gld_zoo", config=flat_options(trainer.recipe))
    if resume:
        trainer.restore()
    task.prepare(trainer.run.path)
    for line in task.introduction():
        say(line)
    say(trainer.measure_start())
    try:
        trainer.fit(
            lambda line: say(telling.epoch_line(line, task, trainer.run.history)), interruption
        )
    except Stopped as stopped:
        trainer.write_metrics(last=True)
        say(f"{stopped}; go on with --resume: the same command, --run {trainer.run.path} --resume")
        return
    summary = trainer.finish()
    say(telling.best_epoch(summary, task))
    before = telling.score_before(trainer.state.before)
    for line in task.conclusion(summary, before, trainer.run.path):
        say(line)


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, which Accelerate would leave out without a word."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise RunError(f"trackers: {name} is not installed; pip install {name}")


def flat_options(recipe: Options) -> dict[str, Any]:
    """Return a recipe's options as trackers take them: numbers, words and truth values."""
    options = dataclasses.asdict(recipe)
    plain = (int, float, str, bool)
    return {
        name: value if isinstance(value, plain) else str(value) for name, value in options.items()
    }

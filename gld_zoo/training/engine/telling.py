"""What a run tells people: how it starts, where it stands, what it came to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from gld_zoo.training.engine.task import Task
from gld_zoo.training.runs.curves import measured_split

BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n}/{total} {elapsed}<{remaining}{postfix}"


def progress(
    batches: Iterable[Any], *, epoch: int, epochs: int, start: int, steps: int, hidden: bool
) -> Any:
    """Return an epoch's batches behind a bar that shows how many are done.

    Args:
        batches: What is left of the epoch.
        epoch: Counted from 0.
        epochs: Of the run.
        start: Steps done before.
        steps: Of the epoch.
        hidden: Whether another process of this machine shows it.
    """
    return tqdm(
        batches,
        desc=f"epoch {epoch + 1}/{epochs}",
        initial=start,
        total=steps,
        bar_format=BAR,
        leave=False,
        disable=True if hidden else None,  # None hides it where nobody watches
    )


def standing(task: Task, means: dict[str, float], lr: float, images_per_second: float) -> str:
    """Return what the bar shows beside itself: the epoch so far, of which a narrow window cuts."""
    score = means.get(f"train_{task.metric}")
    shown = "" if score is None else f"{task.metric_title} {score:.1f} "
    return f"{shown}{images_per_second:.0f} images/s lr {lr:.3g} {_terms(means)}"


def start_line(task: Task, position: tuple[int, int], before: dict[str, Any]) -> str:
    """Return a line on the model as it is before the first step of this launch.

    Args:
        task: What is trained.
        position: Epochs done, and steps of the next one.
        before: What the model scored before training, and of which weights that is; empty where an
            earlier launch has told it.
    """
    if not before:
        return f"{task.describe_model()}, {_done(position)}: going on"
    return (
        f"{task.describe_model()}, {before['origin']}: {task.metric_title} {before['score']:.2f} %"
    )


def origin_of(task: Task, position: tuple[int, int]) -> str:
    """Return of which weights the first score is, and on which images."""
    told = _done(position) if any(position) else task.describe_origin()
    return told + (", on the images held out" if task.data.val else "")


def score_before(measured: dict[str, Any]) -> str:
    """Return what the model scored before training."""
    return f"{measured['score']:.2f} % before ({measured['origin']})"


def _done(position: tuple[int, int]) -> str:
    epoch, step = position
    return f"after {epoch} epochs" + (f" and {step} steps" if step else "")


def epoch_line(line: dict[str, Any], task: Task, history: list[dict[str, Any]]) -> str:
    """Return an epoch's metrics as one line for people.

    Args:
        line: The metrics.
        task: What is trained.
        history: Those of all epochs so far.
    """
    epochs, metric = task.recipe.epochs, task.metric
    split = measured_split(history)
    minutes = line["seconds"] * (epochs - line["epoch"]) / 60
    shown = task.metric_title
    if f"{split}_{metric}" in line:
        shown += f" {split} {line[f'{split}_{metric}']:.2f}"
    if (raw := line.get(f"{split}_raw_{metric}")) is not None:
        shown += f" (without averaging {raw:.2f})"
    if f"train_{metric}" in line:
        shown += f" train {line[f'train_{metric}']:.2f}"
    return (
        f"epoch {line['epoch']}/{epochs}  {shown}  "
        f"{_terms(line)}  lr {line['lr']:.3g}  {line['images_per_second']:.0f} images/s  "
        f"{minutes:.1f} min left"
    )


def best_epoch(summary: dict[str, Any], task: Task) -> str:
    """Return a note on the best epoch, which is not what the run is for."""
    best = summary[f"best_epoch_{task.metric}"]
    return (
        f"best {task.metric_title} of an epoch, as a note: {best:.2f} % at "
        f"epoch {summary['best_epoch']} ({summary['best_epoch_split']})"
    )


def _terms(values: dict[str, Any]) -> str:
    return " ".join(
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in values.items()
        if name.startswith("loss")
    )

"""A run's folder: who may open it, and what is written there beside checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gld_zoo.training.common.disk import (
    lock,
    replace_folder,
    replacing,
    write_json,
    write_text,
    writing,
)
from gld_zoo.training.common.errors import HeldError, RunError
from gld_zoo.training.config.options import Options
from gld_zoo.training.runs.curves import draw_curves, measured_split
from gld_zoo.training.runs.environment import changed_environment, describe_environment

LOCK = ".lock"
REDRAW_SECONDS = 60.0  # a picture takes the better part of one
# stands for the longest path within a run folder
LONGEST = f"checkpoints/{'x' * 40}/{'x' * 40}"


class RunFolder:
    """Open a run folder for a new run or, with `resume`, for going on.

    Args:
        path: The folder.
        recipe: The run's options.
        resume: Accept a folder that holds an unfinished run of the same recipe; without one, start
            anew.

    Raises:
        RunError: If the folder holds a run and `resume` is false, another recipe's run or other
            files, a file stands in its place, or it cannot be read or named so.
    """

    def __init__(self, path: Path, recipe: Options, *, resume: bool) -> None:
        self.path = path
        self.recipe = recipe
        self.checkpoints = path / "checkpoints"
        self.resume = resume
        self.history: list[dict[str, Any]] = []
        self._lock: Any = None
        self._drawn = time.monotonic()
        self._check_name()
        self._check()

    def _check_name(self) -> None:
        """Refuse a name that the disk does not take, before the folders above it are made."""
        folders = [self.path, *self.path.parents]
        there = next((folder for folder in folders if os.path.isdir(folder)), self.path)
        # what does not exist hides that a name below it is too long, so each is asked for by itself
        parts = [there / part for part in self.path.relative_to(there).parts]
        for path in (*parts, self.path / LONGEST):
            try:
                path.lstat()
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise RunError(
                        f"the name of the run folder {self.path} is too long; name a shorter one "
                        "by --run"
                    ) from error

    def _check(self) -> None:
        try:
            self._check_content()
        except OSError as error:
            raise RunError(
                f"cannot read the run folder {self.path}: {error.strerror}; name another by --run"
            ) from error

    def _check_content(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; name another run folder by --run")
        if not self.path.is_dir() or all(
            path.name.endswith((".partial", LOCK)) for path in self.path.iterdir()
        ):
            return
        saved = self.path / "recipe.yaml"
        if not saved.is_file():
            raise RunError(f"{self.path} is not empty and holds no run; name another by --run")
        if not self.resume:
            state = "a finished run" if self.finished else "an unfinished run"
            remedy = "begin another in a folder of its own by --run"
            if not self.finished:
                remedy = f"go on with --resume or {remedy}"
            raise RunError(f"{self.path} holds {state}; {remedy}, or delete the folder")
        try:
            theirs = type(self.recipe).load(saved)
        except ValueError as error:
            raise RunError(f"{saved} is not a recipe of this version: {error}") from error
        differences = self.recipe.differences(theirs)
        if differences:
            raise RunError(
                f"{self.path} holds a run of another recipe ({'; '.join(differences)}); "
                "name another by --run"
            )

    @property
    def finished(self) -> bool:
        """Tell whether the run in the folder went to its end."""
        return (self.path / "summary.json").is_file()

    def start(self, accelerator: Accelerator) -> None:
        """Write `recipe.yaml` and `env.json`, once every process has opened the folder.

        A resumed run keeps its first environment; the later ones are listed below it.

        Raises:
            RunError: If the folder is in use.
        """
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = lock(self.path / LOCK)
            except HeldError as error:
                raise RunError(
                    f"{self.path} is in use by {error}; wait for its end or name another by --run"
                ) from error
        self._check()  # another may have begun here since
        environment = describe_environment(accelerator)
        if not (self.path / "recipe.yaml").is_file():
            write_text(self.path / "recipe.yaml", self.recipe.to_yaml())
        if (self.path / "env.json").is_file():
            first = json.loads((self.path / "env.json").read_text(encoding="utf-8"))
            for name, was, now in changed_environment(first, environment):
                accelerator.print(
                    f"{name} was {was} and is {now}: the result may differ from that of an "
                    "unbroken run"
                )
            environment = dict(first, resumed=[*first.get("resumed", []), environment])
        write_json(self.path / "env.json", environment)

    def set_aside(self, checkpoints: list[Path], accelerator: Accelerator) -> None:
        """Rename damaged checkpoints, which would count among those to keep."""
        accelerator.wait_for_everyone()  # every process has read past them
        if accelerator.is_main_process:
            with writing(self.checkpoints):
                for path in checkpoints:
                    aside = path.with_name(f".{path.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)

    def write_metrics(self, metric: str, title: str, *, last: bool = False) -> None:
        """Write the history's lines; draw the curves if a minute has passed, or if it is all."""
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_text(self.path / "metrics.jsonl", lines)
        now = time.monotonic()
        if not last and now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        with replacing(self.path / "curves.png") as temporary:
            draw_curves(self.history, temporary, metric, title)

    def replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Have a folder of the run written, whole or not at all, over an earlier one."""
        temporary, folder = self.path / f".{name}.partial", self.path / name
        with writing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            replace_folder(temporary, folder)


def summarize(
    history: list[dict[str, Any]], measured: dict[str, float], metric: str
) -> dict[str, Any]:
    """Return the last epoch's scores on the test split, and the best epoch's as a footnote."""
    split = measured_split(history)
    measured_lines = [line for line in history if f"{split}_{metric}" in line]
    best = max(measured_lines, key=lambda line: line[f"{split}_{metric}"])
    summary: dict[str, Any] = dict(epochs=history[-1]["epoch"])
    summary.update(
        ("test_loss" if name == "loss" else name, value) for name, value in measured.items()
    )
    summary.update(
        {
            "best_epoch": best["epoch"],
            f"best_epoch_{metric}": best[f"{split}_{metric}"],
            "best_epoch_split": split,
            "seconds": round(sum(line["seconds"] for line in history), 1),
        }
    )
    return summary

"""What a run leaves behind beside checkpoints: recipe, environment, metrics, curves, summary."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator

from recipe import Recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class RunError(RuntimeError):
    """The run folder does not allow what was asked; the message names it and the remedy."""


class RunFolder:
    """Open a run folder for a new run or, with `resume`, for going on.

    Args:
        path: The folder.
        recipe: The run's options.
        resume: Accept a folder that holds an unfinished run of the same recipe; without one, start
            anew.

    Raises:
        RunError: If the folder is in use, or holds another recipe's run or a file stands in its
            place.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        self.path = path
        self.recipe = recipe
        self.checkpoints = path / "checkpoints"
        self.history: list[dict[str, Any]] = []
        self._check(resume)

    def _check(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; name another run folder by --run")
        if not self.path.is_dir() or all(
            path.name.endswith(".partial") for path in self.path.iterdir()
        ):
            return
        saved = self.path / "recipe.yaml"
        if not saved.is_file():
            raise RunError(f"{self.path} is not empty and holds no run; name another by --run")
        if not resume:
            state = "a finished run" if self.finished else "an unfinished run"
            remedy = "name another by --run"
            if not self.finished:
                remedy = f"go on with --resume or {remedy}"
            raise RunError(f"{self.path} holds {state}; {remedy}, or delete the folder")
        try:
            theirs = Recipe.load(saved)
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
        """
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        environment = describe_environment(accelerator)
        if not (self.path / "recipe.yaml").is_file():
            self._write("recipe.yaml", self.recipe.to_yaml())
        if (self.path / "env.json").is_file():
            first = json.loads((self.path / "env.json").read_text(encoding="utf-8"))
            for name in ("processes", "mixed_precision"):
                if environment[name] != first[name]:
                    accelerator.print(
                        f"{name} was {first[name]} and is {environment[name]}: the result will "
                        "differ from that of an unbroken run"
                    )
            environment = dict(first, resumed=[*first.get("resumed", []), environment])
        self.write_json("env.json", environment)

    def rewind(self, history: list[dict[str, Any]]) -> None:
        """Go back to the history that a checkpoint holds."""
        self.history = list(history)

    def discard(self, checkpoints: list[Path], accelerator: Accelerator) -> None:
        """Remove damaged checkpoints, which would count among those to keep."""
        accelerator.wait_for_everyone()  # every process has read past them
        if accelerator.is_main_process:
            for path in checkpoints:
                shutil.rmtree(path)

    def log(self, line: dict[str, Any]) -> None:
        """Add an epoch's metrics and redraw the curves."""
        self.history.append(line)
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        draw_curves(self.history, self.path / "curves.png")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a file whole or not at all."""
        self._write(name, json.dumps(content, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.partial"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what a reader needs to judge and repeat a run."""
    names = ("gld-zoo", "torch", "torchvision", "timm", "accelerate", "datasets")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = accelerator.device
    return dict(
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        commit=_commit(),
        python=platform.python_version(),
        versions=versions,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processor=f"{platform.machine()}, {os.cpu_count()} cores",
        processes=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
    )


def _commit() -> str | None:
    folder = Path(__file__).parent
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            text=True,
            stderr=subprocess.DEVNULL,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draw top-1, loss terms and learning rate by epoch."""
    epochs = [line["epoch"] for line in history]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for key, label in (("train_top1", "train"), ("test_top1", "test")):
        axes[0].plot(epochs, [line[key] for line in history], marker=".", label=label)
    axes[0].set(title=f"top-1, test {history[-1]['test_top1']:.2f} %", xlabel="epoch", ylabel="%")
    for key in history[-1]:
        if key.startswith("loss_") or key == "loss":
            style = dict(color="black", linewidth=2) if key == "loss" else {}
            axes[1].plot(
                epochs, [line[key] for line in history], label=key.removeprefix("loss_"), **style
            )
    axes[1].set(title="training loss and its weighted terms", xlabel="epoch", yscale="log")
    axes[2].step(epochs, [line["lr"] for line in history], where="mid", color="gray")
    axes[2].set(title="learning rate", xlabel="epoch", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend()
    axes[1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)

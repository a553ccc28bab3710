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
from torch import nn

from disk import flush, replacing, write_text, writing
from gld_zoo.hub import save_pretrained
from recipe import Recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


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
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        environment = describe_environment(accelerator)
        if not (self.path / "recipe.yaml").is_file():
            write_text(self.path / "recipe.yaml", self.recipe.to_yaml())
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

    def rewind(self, history: list[dict[str, Any]], accelerator: Accelerator) -> None:
        """Go back to the history that a checkpoint holds."""
        self.history = list(history)
        if history and accelerator.is_main_process:
            self.write_metrics()

    def discard(self, checkpoints: list[Path], accelerator: Accelerator) -> None:
        """Remove damaged checkpoints, which would count among those to keep."""
        accelerator.wait_for_everyone()  # every process has read past them
        if accelerator.is_main_process:
            for path in checkpoints:
                shutil.rmtree(path)

    def write_metrics(self) -> None:
        """Write the history's lines and redraw the curves."""
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_text(self.path / "metrics.jsonl", lines)
        with replacing(self.path / "curves.png") as temporary:
            draw_curves(self.history, temporary)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a file whole or not at all."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def export(self, name: str, model: nn.Module, **config: Any) -> None:
        """Write a model as timm loads it, whole or not at all, over an earlier one."""
        temporary, folder = self.path / f".{name}.partial", self.path / name
        with writing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            save_pretrained(model, temporary, **config)
            for written in [*temporary.iterdir(), temporary]:
                flush(written)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)


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
        threads=torch.get_num_threads(),
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


def measured_split(line: dict[str, Any]) -> str:
    """Return which split a line of metrics was measured on: the one held out, if any."""
    return "val" if "val_top1" in line else "test"


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draw top-1, loss terms and learning rate by epoch."""
    epochs = [line["epoch"] for line in history]
    last = history[-1]
    split = measured_split(last)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in ("train", split):
        values = [line[f"{name}_top1"] for line in history]
        axes[0].plot(epochs, values, marker=".", label=name)
    axes[0].set(title=f"top-1, {split} {last[f'{split}_top1']:.2f} %", ylabel="%")
    terms = [key for key in last if key.startswith("loss")]
    for key in terms if len(terms) > 2 else ["loss"]:
        style = dict(color="black", linewidth=2) if key == "loss" else {}
        label = "sum" if key == "loss" else key.removeprefix("loss_")
        axes[1].plot(epochs, [line[key] for line in history], label=label, **style)
    axes[1].set(title="training loss and its weighted terms", yscale="log")
    rates = [line["lr"] for line in history]
    axes[2].stairs(rates, [0.5, *(epoch + 0.5 for epoch in epochs)], baseline=None, color="gray")
    axes[2].set(title="learning rate", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[1:]:
        ax.yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[2].set_xlim(left=min(epochs) - 0.5)
    axes[0].legend()
    if len(terms) > 2:
        axes[1].margins(y=0.25)  # for the legend
        axes[1].legend(ncols=len(terms), loc="upper center", fontsize="small", columnspacing=1)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)

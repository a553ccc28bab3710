"""What a finished run leaves for others to take: its recipe, scores, machine and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gld_zoo.hub import resolve_name
from gld_zoo.training.common.disk import sha256
from gld_zoo.training.common.errors import RunError
from gld_zoo.training.config.recipe import Recipe


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read: `summary.json` marks it as finished."""

    path: Path
    recipe: Recipe
    summary: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> FinishedRun:
        """Read a folder.

        Raises:
            RunError: If it holds no finished run, one of another trainer, or one of an old version.
        """
        if not (path / "summary.json").is_file():
            raise RunError(f"{path} holds no finished run; go on with one by --resume")
        environment = json.loads((path / "env.json").read_text(encoding="utf-8"))
        try:
            recipe = Recipe.load(path / "recipe.yaml")
        except ValueError as error:
            raise RunError(f"{path} holds no run of gld-zoo distill: {error}") from error
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        if "teacher" not in summary:
            raise RunError(
                f"{path} was finished by a version that did not record its teacher; delete its "
                "summary.json and resume it"
            )
        if "top1" not in summary:
            raise RunError(
                f"{path} was trained without labels, so it holds a backbone and no classifier to "
                f"describe; gld-zoo probe --model {path} measures it on a dataset with classes, "
                "and timm.models.push_to_hf_hub publishes it"
            )
        return cls(path, recipe, summary, environment)

    @property
    def dataset(self) -> str:
        """The dataset's hub id, or the name of its folder."""
        name = self.summary["dataset"]
        # runs of before its kind was written down
        folder = self.summary.get("dataset_is_folder", Path(name).is_absolute())
        return Path(name).name if folder else name

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The environments of its first launch and of each that went on with it."""
        return [self.environment, *self.environment.get("resumed", [])]

    def portable(self) -> Recipe:
        """Return its recipe without folders of this machine.

        Of a dataset's or a model's the name is left; a teacher's store is found anew by `auto`.
        """
        student, teacher = self.recipe.student, self.recipe.teacher
        return replace(
            self.recipe,
            dataset=self.dataset,
            student=_portable(student),
            teacher=teacher and _portable(teacher),
            teacher_store=self.recipe.teacher_store and "auto",
        )

    def teacher(self) -> dict[str, Any] | None:
        """Return what a card tells of its teacher; of one in a folder it names the architecture."""
        name = self.recipe.teacher
        if not name:
            return None
        folder = _resolved(name)
        config = Path(folder.removeprefix("local-dir:")) / "config.json"
        if folder.startswith("local-dir:") and config.is_file():
            name = str(json.loads(config.read_text(encoding="utf-8"))["architecture"])
        recorded = self.summary["teacher"]
        return dict(
            name=_portable(name),
            sha256=recorded.get("sha256"),
            top1=recorded.get("top1"),
            fitted_head=self.recipe.teacher_head == "fit",
        )

    def description(self) -> dict[str, Any]:
        """Return how it was trained, as results.json holds it."""
        precisions = [launch["mixed_precision"] for launch in self.launches]
        return dict(
            dataset=self.dataset,
            train_images=self.summary["train_images"],
            epochs=self.recipe.epochs,
            schedule=_schedule(self.recipe),
            precision=_listed("float32" if name == "no" else name for name in precisions),
            hardware=_hardware(self.launches),
            processes=self.environment["processes"],
            versions=self.environment["versions"],
            by_gld=self.recipe.teaches_by_gld or not self.recipe.teacher,
        )

    def scores(self) -> dict[str, Any]:
        """Return what it scored, as results.json holds each seed."""
        summary = self.summary
        raw = {"raw_top1": summary["raw_top1"]} if "raw_top1" in summary else {}
        return dict(
            seed=self.recipe.seed,
            top1=summary["top1"],
            **raw,  # of the weights as they are, beside an average
            top5=summary["top5"],
            best_epoch=summary["best_epoch"],
            best_epoch_top1=summary["best_epoch_top1"],
            best_epoch_split=summary["best_epoch_split"],
            hours=round(summary["seconds"] / 3600, 2),
            commit=", ".join(dict.fromkeys(str(launch["commit"]) for launch in self.launches)),
            sha256=sha256(self.path / "last" / "model.safetensors"),
        )


def _hardware(launches: list[dict[str, Any]]) -> str:
    """Return the machines, processes if several, and on a CPU the threads, of all launches."""
    words = [_listed(f"{launch['device']}, {launch['processor']}" for launch in launches)]
    processes = sorted({launch["processes"] for launch in launches})
    if processes != [1]:
        words.append(f"{_listed(processes)} processes")
    if all(launch["device"] == "cpu" for launch in launches):
        threads = sorted({launch["threads"] for launch in launches})
        words.append(f"{_listed(threads)} thread{'' if threads == [1] else 's'}")
    return ", ".join(words)


def _listed(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))


def _schedule(recipe: Recipe) -> str:
    """Return a recipe's learning rate in words."""
    opt = "SGD" if recipe.opt == "sgd" else recipe.opt
    words = [f"Nesterov {opt}" if recipe.nesterov else opt]
    words[0] += f", batch {recipe.batch_size}, lr {recipe.lr:g}"
    if recipe.schedule == "poly":
        words += [f"times (1 - share of the epochs)^{recipe.lr_power:g}"]
    elif recipe.schedule != "steps":
        words += [f"to 0 ({recipe.schedule})"]
    elif recipe.lr_drops:
        drops = " and ".join(f"{drop:.0%}" for drop in recipe.lr_drops)
        words += [f"x{recipe.lr_decay:g} at {drops}"]
    if recipe.warmup_epochs:
        words += [f"after a warm-up of {recipe.warmup_epochs:g} epochs"]
    if recipe.ema is not None:
        words += [f"with an average of the weights ({recipe.ema:g} a step)"]
    return " ".join(words)


def _resolved(name: str) -> str:
    try:
        return resolve_name(name)
    except ValueError:  # what was there is gone
        return name


def _portable(name: str) -> str:
    """Return a model's name, of a folder the last two parts alone."""
    name = _resolved(name)
    if not name.startswith("local-dir:"):
        return name
    return "local-dir:" + "/".join(Path(name.removeprefix("local-dir:")).parts[-2:])

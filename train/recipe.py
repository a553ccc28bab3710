"""The options of a run: declared once, read from YAML and the command line, written back."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser


def option(default: Any, text: str, *, decides: bool = True) -> Any:
    """Declare one option: its default, one line of help with its unit, if it decides the result."""
    metadata = {"help": text, "decides": decides}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options of a run; the defaults are the paper's CIFAR-100 setting."""

    student: str = option(
        dataclasses.MISSING,
        "model to train: timm name, hf-hub:ORG/NAME or local-dir:PATH",
    )
    teacher: str | None = option(
        None,
        "model to distil from: timm name, hf-hub:ORG/NAME or local-dir:PATH; null for labels alone",
    )
    finetune: Literal["all", "classifier"] | None = option(
        None,
        "start from the student's pretrained weights, with a new classifier if the classes differ, "
        "and train all of it or the classifier alone; null starts from random weights",
    )

    dataset: str = option("uoft-cs/cifar100", "hub id, folder in hub layout, or image folder")
    train_split: str = option("train", "split to train on")
    test_split: str | None = option(
        None, "split to measure on; null takes 'test', else 'validation'"
    )
    image_column: str | None = option(None, "column of images; null takes the first of that type")
    label_column: str | None = option(
        None, "column of class labels; null takes the first of that type"
    )
    val_fraction: float = option(
        0.0,
        "share of the training images held out, class by class; they are measured each epoch and "
        "select best/, and the test split is measured at the end alone",
    )

    image_size: int | None = option(
        None, "side of the square images in pixels; null takes the student's"
    )
    crop: Literal["padded", "resized"] = option(
        "padded",
        "random training crop: of the image with a border, or of a part of it, resized",
    )
    crop_padding: int = option(
        4, "black border in pixels round an image before its random crop; 0 for no crop"
    )
    crop_scale: list[float] = option(
        [0.08, 1.0], "smallest and largest part of the area that a resized crop takes, 0 to 1"
    )
    crop_pct: float = option(
        1.0, "share of the resized image's side that the centre crop keeps when measuring, 0 to 1"
    )
    flip: bool = option(True, "mirror half of the training images")

    in_memory: bool | None = option(
        None, "decode the images once and keep them on the device; null: if they fit in 8 GiB"
    )
    workers: int = option(
        2,
        "processes that read images where they are not in memory, for training and for each split "
        "measured; their number decides the order of a stream",
        decides=False,
    )
    streaming: bool = option(False, "read the dataset in order from the hub, without a local copy")
    shuffle_buffer: int = option(10_000, "encoded images that a stream is shuffled over")
    train_images: int | None = option(
        None, "images of an epoch of a stream; null takes the number in the dataset's card"
    )

    grid: int = option(2, "cells along each side of the feature map, the paper's d")
    alpha: float = option(0.7, "share of the global distillation against cross-entropy, 0 to 1")
    beta: float = option(
        500.0, "weight of the relation, as it is: scale it by batch_size (1 + grid²) / 320"
    )
    local_weight: float = option(1.0, "weight of the local distillation")

    epochs: int = option(200, "passes over the training split")
    batch_size: int = option(64, "images a step, over all processes together")
    lr: float = option(0.1, "initial learning rate")
    lr_drops: list[float] = option(
        [0.5, 0.75], "when the learning rate drops, as fractions of the epochs"
    )
    lr_decay: float = option(0.1, "factor of each drop")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "L2 penalty on every parameter")

    seed: int = option(
        0, "seed of the initial weights, the order of the images and their augmentation"
    )
    sync_batch_norm: bool = option(
        False, "batch norm over the batches of all processes together, instead of each its own"
    )
    compile: bool = option(
        False, "compile the models with torch.compile: slower start, faster steps on most GPUs"
    )
    threads: int | None = option(
        None,
        "CPU threads of each process; null shares this machine's cores among its processes",
        decides=False,
    )
    eval_batch_size: int = option(
        500, "images a step of evaluation, over all processes together", decides=False
    )

    checkpoint_minutes: float = option(
        30.0,
        "minutes between checkpoints within an epoch, beside the one at its end",
        decides=False,
    )
    keep_checkpoints: int = option(2, "newest checkpoints to keep", decides=False)
    max_minutes: float | None = option(
        None, "minutes after which to write a checkpoint and end; null for no limit", decides=False
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = option(
        [], "where to log each epoch besides metrics.jsonl, such as '[tensorboard]'", decides=False
    )

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming them."""
        ranges = dict(
            image_size=(1, math.inf),
            crop_padding=(0, math.inf),
            grid=(1, math.inf),
            alpha=(0, 1),
            beta=(0, math.inf),
            local_weight=(0, math.inf),
            epochs=(1, math.inf),
            batch_size=(1, math.inf),
            lr=(0, math.inf),
            lr_decay=(0, 1),
            momentum=(0, 1),
            weight_decay=(0, math.inf),
            seed=(0, math.inf),
            eval_batch_size=(1, math.inf),
            keep_checkpoints=(1, math.inf),
            crop_pct=(0.01, 1),
            workers=(0, math.inf),
            shuffle_buffer=(1, math.inf),
            train_images=(1, math.inf),
            threads=(1, math.inf),
            checkpoint_minutes=(0, math.inf),
            max_minutes=(0, math.inf),
        )
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{name}={value} is out of range; it must lie between {low} and {high}"
                )
        if any(not 0 < drop < 1 for drop in self.lr_drops):
            raise ValueError(
                f"lr_drops={self.lr_drops} must be fractions of the epochs, between 0 and 1"
            )
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale} must be two parts of the area, the smaller first, "
                "between 0 and 1"
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be at least 0 and below 1")
        if self.streaming and (self.val_fraction or self.in_memory):
            raise ValueError("streaming cannot be combined with val_fraction or in_memory")

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        drops = sum(epoch >= round(drop * self.epochs) for drop in self.lr_drops)
        return self.lr * self.lr_decay**drops

    def differences(self, other: Recipe) -> list[str]:
        """Describe in which options that decide the result another recipe differs, one each."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata["decides"]]
        if self.streaming:
            names.append("workers")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [
            f"{name}: {mine} here, {theirs} there" for name, mine, theirs in pairs if mine != theirs
        ]

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `--config` takes."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe that a run or a person wrote.

        Raises:
            ValueError: If an option is unknown, missing or of the wrong type.
        """
        parser = ArgumentParser(exit_on_error=False)
        add_recipe_options(parser)
        try:
            return cls(**parser.parse_path(str(path)).as_dict())
        except ArgumentError as error:
            raise ValueError(f"{path}: {error}") from error


# under which title `--help` shows the options from this one on
GROUPS = dict(
    student="models",
    dataset="dataset",
    image_size="images",
    in_memory="reading",
    grid="loss",
    epochs="schedule",
    seed="run",
)


def add_recipe_options(parser: ArgumentParser) -> None:
    """Give a parser one option a field of `Recipe`, in groups."""
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        options: dict[str, Any] = dict(type=hints[field.name], help=field.metadata["help"])
        if field.default is not dataclasses.MISSING:
            options["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        else:
            options["required"] = True
        group.add_argument(f"--{field.name}", **options)


@dataclasses.dataclass(frozen=True)
class Command:
    """A recipe and where it runs."""

    recipe: Recipe
    run: Path
    resume: bool


def parse_command(description: str, argv: list[str] | None = None) -> Command:
    """Read `--config FILE`, then `--field value` over it; a mistake ends the program."""
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--config", action="config", help="YAML file of options; the command line goes before it"
    )
    parser.add_argument(
        "--run", type=str | None, help="run folder; null makes runs/<recipe>-<seed>"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run folder's newest checkpoint, if any; its recipe need not be given",
    )
    add_recipe_options(parser)
    namespace = parser.parse_args(with_saved_recipe(sys.argv[1:] if argv is None else argv))
    configs = namespace.pop("config") or []
    values = namespace.as_dict()
    run, resume = values.pop("run"), values.pop("resume")
    try:
        recipe = Recipe(**values)
    except ValueError as error:
        parser.error(str(error))
    return Command(recipe, Path(run or default_run(recipe, configs)), resume)


def with_saved_recipe(argv: list[str]) -> list[str]:
    """Return the arguments with the run folder's own recipe where a run goes on without another."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--run", "--student"):
        parser.add_argument(name)
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args(argv)
    if not (given.resume and given.run) or given.config or given.student:
        return argv
    saved = Path(given.run) / "recipe.yaml"
    return ["--config", str(saved), *argv] if saved.is_file() else argv


def default_run(recipe: Recipe, configs: list[Any]) -> str:
    """Name a run after its recipe's file, that file's folder for a saved recipe, or its student."""
    name = Path(str(configs[-1])).stem if configs else recipe.student
    if configs and name == "recipe":
        name = Path(str(configs[-1])).resolve().parent.name
    name = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return f"runs/{name}-{recipe.seed}"

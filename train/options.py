"""The options of any run: declared once, read from YAML and the command line, written back."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from argparse import ArgumentError
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

Kind = TypeVar("Kind", bound="Options")
Schedule = Literal["steps", "linear", "rex", "cosine", "poly"]
MODE = "recipe"  # how jsonargparse reads YAML here


def load_yaml(text: str) -> Any:
    """Read YAML; a recipe of an earlier version becomes one of this.

    Before there were schedules, `lr_power` chose one: null the drops, a number the poly schedule.
    """
    value = get_loader("yaml")(text)
    if isinstance(value, dict) and "lr_power" in value and "schedule" not in value:
        value["schedule"] = "steps" if value["lr_power"] is None else "poly"
        if value["lr_power"] is None:
            del value["lr_power"]
    return value


set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError,))


def option(default: Any, text: str, *, decides: bool = True) -> Any:
    """Declare one option: its default, one line of help with its unit, if it decides the result."""
    metadata = {"help": text, "decides": decides}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """The schedule and the conduct of a run, whatever it trains."""

    # under which title `--help` shows the options from this one on
    GROUPS: ClassVar[dict[str, str]] = dict(epochs="schedule", opt="optimiser", seed="run")
    # smallest and largest value
    RANGES: ClassVar[dict[str, tuple[float, float]]] = dict(
        epochs=(1, math.inf),
        batch_size=(1, math.inf),
        lr=(0, math.inf),
        lr_decay=(0, 1),
        lr_power=(0, math.inf),
        warmup_epochs=(0, math.inf),
        momentum=(0, 1),
        weight_decay=(0, math.inf),
        layer_decay=(0.01, 1),
        clip_grad=(1e-6, math.inf),
        ema=(0, 1),
        seed=(0, math.inf),
        measure_every=(1, math.inf),
        eval_batch_size=(1, math.inf),
        keep_checkpoints=(1, math.inf),
        threads=(1, math.inf),
        checkpoint_minutes=(0, math.inf),
        max_minutes=(0, math.inf),
    )

    epochs: int = option(200, "passes over the training split")
    batch_size: int = option(64, "images a step, over all processes together")
    lr: float = option(0.1, "initial learning rate")
    schedule: Schedule = option(
        "steps", "how the learning rate falls: by lr_drops, or every step, to 0 at the end"
    )
    lr_drops: list[float] = option(
        [0.5, 0.75], "when it drops, as fractions of the epochs (schedule: steps)"
    )
    lr_decay: float = option(0.1, "factor of each drop (schedule: steps)")
    lr_power: float = option(
        0.9, "lr times (1 - share of the epochs done) to this power (schedule: poly)"
    )
    warmup_epochs: float = option(0.0, "epochs in which the learning rate rises from 0, linearly")

    opt: str = option("sgd", "any optimiser of timm.optim; sgd is plain unless nesterov is set")
    momentum: float = option(0.9, "momentum of SGD and its like, 0 to 1")
    nesterov: bool = option(False, "Nesterov's momentum")
    betas: list[float] | None = option(
        None, "averaging of Adam's like, such as '[0.9, 0.999]'; null takes the optimiser's own"
    )
    weight_decay: float = option(5e-4, "L2 penalty on every parameter")
    decay_norm: bool = option(
        True, "decay norms, biases and what the model excepts too; false leaves them out"
    )
    layer_decay: float | None = option(
        None, "factor of the learning rate from each layer to the one before it; null for none"
    )
    clip_grad: float | None = option(
        None, "largest norm of the gradient; null does not clip (clip_mode)"
    )
    clip_mode: Literal["norm", "agc"] = option(
        "norm", "clip the norm of all, or by agc each unit's as a share of its weights' norm"
    )
    ema: float | None = option(
        None,
        "decay a step of an average of the weights, such as 0.9998, which warms up and is measured "
        "and exported in the weights' place; null for none",
    )

    seed: int = option(
        0, "seed of the initial weights, the order of the images and their augmentation"
    )
    sync_batch_norm: bool = option(
        False, "batch norm over the batches of all processes together, instead of each its own"
    )
    threads: int | None = option(
        None,
        "CPU threads of each process; null shares this machine's cores among its processes",
        decides=False,
    )
    measure_every: int = option(
        1, "epochs from one measurement to the next; the last epoch is always measured"
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
        hints = get_type_hints(type(self))
        for name in (field.name for field in self.fields()):
            # as an empty line of a YAML file gives
            if getattr(self, name) is None and type(None) not in get_args(hints[name]):
                raise ValueError(f"{name} has no value; leave it out for its default")
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"{name}={value} is out of range; it must lie between {low} and {high}"
                )
        if any(not 0 < drop < 1 for drop in self.lr_drops):
            raise ValueError(
                f"lr_drops={self.lr_drops} must be fractions of the epochs, between 0 and 1"
            )
        if self.betas and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be at least 0 and below 1")
        if self.clip_grad is None:
            self.refuse("has no effect without clip_grad", "clip_mode")
        if self.schedule != "steps":
            self.refuse("is for schedule: steps alone", "lr_drops", "lr_decay")
        if self.schedule != "poly":
            self.refuse("is for schedule: poly alone", "lr_power")

    def refuse(self, reason: str, *names: str) -> None:
        """Refuse options that are not at their default and would have no effect."""
        for field in dataclasses.fields(self):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.name in names and (value := getattr(self, field.name)) != default:
                raise ValueError(f"{field.name}={value} {reason}")

    @property
    @abstractmethod
    def subject(self) -> str:
        """The name of the model that is trained."""

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate after a number of epochs, which need not be whole.

        Sources: linear, Li, Yumer and Ramanan, "Budgeted Training", ICLR 2020; rex, Chen, Wolfe and
        Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule", 2021.
        """
        done = epoch / self.epochs
        factors = dict(
            steps=lambda: self.lr_decay ** self._drops_before(epoch),
            linear=lambda: 1 - done,
            rex=lambda: (1 - done) / (1 - done / 2),
            cosine=lambda: (1 + math.cos(math.pi * done)) / 2,
            poly=lambda: (1 - done) ** self.lr_power,
        )
        lr = self.lr * factors[self.schedule]()
        return lr * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else lr

    def _drops_before(self, epoch: float) -> int:
        # at the nearest whole epoch, but not before the first is done
        ends = (max(1, math.floor(drop * self.epochs + 0.5)) for drop in self.lr_drops)
        return sum(epoch >= end for end in ends)

    @classmethod
    def fields(cls) -> list[dataclasses.Field[Any]]:
        """Return the options in the order in which people read them: a task's own come first."""
        shared = {field.name for field in dataclasses.fields(Options)}
        own = [field for field in dataclasses.fields(cls) if field.name not in shared]
        return own + [field for field in dataclasses.fields(cls) if field.name in shared]

    def deciding(self) -> list[str]:
        """Return the names of the options that decide the result."""
        return [field.name for field in self.fields() if field.metadata["decides"]]

    def differences(self, other: Options) -> list[str]:
        """Describe in which options that decide the result another recipe differs, one each."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.deciding())
        return [
            f"{name}: {mine} here, {theirs} there" for name, mine, theirs in pairs if mine != theirs
        ]

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `--config` takes."""
        values = dataclasses.asdict(self)
        return yaml.safe_dump(
            {field.name: values[field.name] for field in self.fields()}, sort_keys=False
        )

    @classmethod
    def load(cls: type[Kind], path: Path) -> Kind:
        """Read a recipe that a run or a person wrote.

        Raises:
            ValueError: If it cannot be read, or an option is unknown, missing or of the wrong type.
        """
        check_text(path)
        parser = ArgumentParser(exit_on_error=False, parser_mode=MODE)
        cls.add_to(parser)
        try:
            return cls(**parser.parse_path(str(path)).as_dict())
        except ArgumentError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Give a parser one option a field, in groups."""
        hints = get_type_hints(cls)
        for field in cls.fields():
            if field.name in cls.GROUPS:
                group = parser.add_argument_group(cls.GROUPS[field.name])
            options: dict[str, Any] = dict(type=hints[field.name], help=field.metadata["help"])
            if field.default is not dataclasses.MISSING:
                options["default"] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                options["default"] = field.default_factory()
            else:
                options["required"] = True
            group.add_argument(f"--{field.name}", **options)


@dataclasses.dataclass(frozen=True)
class Command(Generic[Kind]):
    """A recipe and where it runs."""

    recipe: Kind
    run: Path
    resume: bool


def parse_command(
    kind: type[Kind], description: str, argv: list[str] | None = None
) -> Command[Kind]:
    """Read `--config FILE`, then `--field value` over it; a mistake ends the program."""
    parser = ArgumentParser(description=description, parser_mode=MODE)
    parser.add_argument(
        "--config", action="config", help="YAML file of options; those given here override it"
    )
    parser.add_argument(
        "--run", type=str | None, help="run folder; null makes runs/<recipe>-<seed>"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run folder's newest checkpoint, if any; its recipe need not be given",
    )
    kind.add_to(parser)
    argv = sys.argv[1:] if argv is None else argv
    namespace = parser.parse_args(_config_first(argv))
    configs = namespace.pop("config") or []
    values = namespace.as_dict()
    run, resume = values.pop("run"), values.pop("resume")
    try:
        recipe = kind(**values)
    except ValueError as error:
        parser.error(str(error))
    return Command(recipe, Path(run or default_run(recipe, configs)), resume)


def _config_first(argv: list[str]) -> list[str]:
    """Return the arguments with the config before what overrides it, wherever it was written.

    A run that goes on without one takes its folder's own recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", default=[])
    configs, others = parser.parse_known_args(argv)
    parser.add_argument("--run", nargs="?")
    parser.add_argument("--resume", action="store_true")
    given, rest = parser.parse_known_args(argv)
    if None in configs.config:  # which the parser of all options tells
        return argv
    if given.resume and given.run and not configs.config:
        saved = Path(given.run) / "recipe.yaml"
        # which is false where a name is too long, and pathlib's raises
        configs.config = [str(saved)] if os.path.isfile(saved) else []
        if not configs.config and not rest:
            sys.exit(
                f"error: {given.run} holds no run to resume (there is no {saved}); name another, "
                "or begin one by its options"
            )
    for path in configs.config:
        if ":" in path and not os.path.lexists(path):
            continue  # options themselves, which jsonargparse takes in a file's place
        try:
            check_text(Path(path))
        except ValueError as error:
            sys.exit(f"error: {error}")
    return [*(part for path in configs.config for part in ("--config", path)), *others]


def check_text(path: Path) -> None:
    """Refuse a recipe that is no text in UTF-8.

    Raises:
        ValueError: If it is not, or cannot be read.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return  # a pipe, which could not be read again
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"the recipe {path} is not in UTF-8 (line {line}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(
            f"cannot read the recipe {path}: {error.strerror}; name a YAML file that can be read"
        ) from error


def default_run(recipe: Options, configs: list[Any]) -> str:
    """Name a run after its recipe's file, that file's folder for a saved recipe, or its model."""
    name = Path(str(configs[-1])).stem if configs else recipe.subject
    if configs and name == "recipe":
        name = Path(str(configs[-1])).resolve().parent.name
    name = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return f"runs/{name}-{recipe.seed}"

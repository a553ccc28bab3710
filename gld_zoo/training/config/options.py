"""The options of any run, its schedule among them: declared once, read, and written back."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from gld_zoo.training.config.recipe_files import MODE, check_text

Kind = TypeVar("Kind", bound="Options")
Schedule = Literal["steps", "linear", "rex", "cosine", "poly"]
OPEN = "???"  # what a recipe leaves to whoever runs it, as in OmegaConf's files


def option(
    default: Any,
    text: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    decides: bool = True,
) -> Any:
    """Declare one option of a recipe, as a field of a dataclass.

    Args:
        default: Its value where a recipe does not give one; MISSING makes it a required one.
        text: A line of help, with the unit.
        at_least: The smallest number that it may be.
        at_most: The largest one.
        decides: Whether it decides the result, so that a run cannot go on with another value.
    """
    metadata = dict(help=text, range=(at_least, at_most), decides=decides)
    return _field(default, metadata)


def another_default(name: str, default: Any) -> Any:
    """Declare an option of `Options` again, with the default that a task gives it."""
    return _field(default, Options.__dataclass_fields__[name].metadata)


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
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

    epochs: int = option(200, "passes over the training split", at_least=1)
    batch_size: int = option(64, "images a step, over all processes together", at_least=1)
    lr: float = option(0.1, "initial learning rate", at_least=0)
    schedule: Schedule = option(
        "steps", "how the learning rate falls: by lr_drops, or every step, to 0 at the end"
    )
    lr_drops: list[float] = option(
        [0.5, 0.75], "when it drops, as fractions of the epochs (schedule: steps)"
    )
    lr_decay: float = option(0.1, "factor of each drop (schedule: steps)", at_least=0, at_most=1)
    lr_power: float = option(
        0.9, "lr times (1 - share of the epochs done) to this power (schedule: poly)", at_least=0
    )
    warmup_epochs: float = option(
        0.0, "epochs in which the learning rate rises from 0, linearly", at_least=0
    )

    opt: str = option("sgd", "any optimiser of timm.optim; sgd is plain unless nesterov is set")
    momentum: float = option(0.9, "momentum of SGD and its like, 0 to 1", at_least=0, at_most=1)
    nesterov: bool = option(False, "Nesterov's momentum")
    betas: list[float] | None = option(
        None, "averaging of Adam's like, such as '[0.9, 0.999]'; null takes the optimiser's own"
    )
    weight_decay: float = option(5e-4, "L2 penalty on every parameter", at_least=0)
    decay_norm: bool = option(
        True, "decay norms, biases and what the model excepts too; false leaves them out"
    )
    layer_decay: float | None = option(
        None,
        "factor of the learning rate from each layer to the one before it; null for none",
        at_least=0.01,
        at_most=1,
    )
    clip_grad: float | None = option(
        None, "largest norm of the gradient; null does not clip (clip_mode)", at_least=1e-6
    )
    clip_mode: Literal["norm", "agc"] = option(
        "norm", "clip the norm of all, or by agc each unit's as a share of its weights' norm"
    )
    ema: float | None = option(
        None,
        "keep a running average of the weights with this decay a step, such as 0.9998, which is "
        "measured and exported in their place; null for none",
        at_least=0,
        at_most=1,
    )

    seed: int = option(
        0, "seed of the initial weights, the order of the images and their augmentation", at_least=0
    )
    sync_batch_norm: bool = option(
        False, "batch norm over the batches of all processes together, instead of each its own"
    )
    threads: int | None = option(
        None,
        "CPU threads of each process; null shares this machine's cores among its processes",
        decides=False,
        at_least=1,
    )
    measure_every: int = option(
        1, "epochs from one measurement to the next; the last epoch is always measured", at_least=1
    )
    eval_batch_size: int = option(
        500, "images a step of evaluation, over all processes together", decides=False, at_least=1
    )

    checkpoint_minutes: float = option(
        30.0,
        "minutes between checkpoints within an epoch, beside the one at its end",
        decides=False,
        at_least=0,
    )
    keep_checkpoints: int = option(2, "newest checkpoints to keep", decides=False, at_least=1)
    max_minutes: float | None = option(
        None,
        "minutes after which to write a checkpoint and end; null for no limit",
        decides=False,
        at_least=0,
    )
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = option(
        [], "where to log each epoch besides metrics.jsonl, such as '[tensorboard]'", decides=False
    )

    def __post_init__(self) -> None:
        """Refuse values outside their range, naming them."""
        hints = get_type_hints(type(self))
        for field in self.fields():
            # as an empty line of a YAML file gives
            if getattr(self, field.name) is None and type(None) not in get_args(hints[field.name]):
                raise ValueError(f"{field.name} has no value; leave it out for its default")
            value, (low, high) = getattr(self, field.name), field.metadata["range"]
            if value == OPEN:
                raise ValueError(
                    f"the recipe leaves {field.name} open; give --{field.name} "
                    f"({field.metadata['help']})"
                )
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(
                    f"{field.name}={value} is out of range; it must lie between {low} and {high}"
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

"""What the zoo has on record: `results.json`, its rows and each seed's run with their types."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "results.json"
ROLES = ("teacher", "alone", "gld")
# held against each other in one setup, where NAME's row has the role method_NAME
METHODS = dict(
    alone="labels alone",
    kd="knowledge distillation (Hinton et al.)",
    lskd="logit standardisation (Sun et al.)",
    sdd="scale-decoupled distillation (Wei et al.)",
    relation="GLD's relation alone",
    **{"global": "GLD's global term alone"},
    local="GLD's local term alone",
    gld="GLD",
)


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """What one run of a row scored at its last epoch, in %, and how.

    `best_epoch` and its score are a note, of the split `best_epoch_split`; `raw_top1` is that of
    the weights where `top1` is their average's; `sha256` is of the file that the run wrote.
    """

    seed: int
    top1: float
    top5: float
    best_epoch: int
    best_epoch_top1: float
    commit: str
    best_epoch_split: str = "test"
    raw_top1: float | None = None
    hours: float | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """From what a row's runs were distilled: its name, the hash of its weights, its top-1 in %.

    `fitted_head` says that a linear head was fitted to it for the row's classes.
    """

    name: str
    sha256: str | None = None
    top1: float | None = None
    fitted_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seed alone: what was trained, by which recipe, and the scores.

    `dataset` is a hub id or any name; `recipe` a recipe's name and `changes` the options that were
    set otherwise; `file` the file of weights that ships, if one does, and `sha256` its hash.
    `by_gld` is false where the teacher taught by a part of GLD's loss or by another.
    `finetuned_from` names the weights that the runs began with, `selected` says that the weights
    are the best epoch's instead of the last, `files` are lines about what lies beside them.
    """

    dataset: str
    teacher: TeacherRecord | None
    parameters: int
    recipe: str
    changes: dict[str, Any]
    precision: str
    hardware: str
    sha256: str
    runs: list[SeedRun]
    train_images: int | None = None
    test_images: int | None = None
    epochs: int | None = None
    schedule: str | None = None
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    file: str | None = None
    license: str | None = None
    by_gld: bool = True
    finetuned_from: str | None = None
    selected: bool = False
    test_split: str = "test"
    files: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Read a row as `results.json` holds it.

        Args:
            values: By the names of the fields. A teacher may be its name alone.

        Raises:
            ValueError: If something is missing or unknown; it names what.
        """
        missing = _missing(cls, values)
        runs, teacher = values.get("runs") or [{}], values.get("teacher")
        for number, run in enumerate(runs):
            missing += [f"runs[{number}].{name}" for name in _missing(SeedRun, run)]
        if isinstance(teacher, str):
            teacher = dict(name=teacher)
        if teacher is not None:
            missing += [f"teacher.{name}" for name in _missing(TeacherRecord, teacher)]
        if missing:
            raise ValueError(f"results has no {', '.join(missing)}, which a card tells")
        return cls(
            **dict(
                _known(cls, values),
                teacher=teacher and TeacherRecord(**_known(TeacherRecord, teacher)),
                runs=[SeedRun(**_known(SeedRun, run)) for run in runs],
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the row as `results.json` holds it, without what is not known or as usual."""
        row = _told(self)
        row["teacher"] = self.teacher and _told(self.teacher)
        row["runs"] = [_told(run) for run in self.runs]
        return row

    def mean(self, score: str = "top1") -> str:
        """Return the mean of a score over the seeds, and its standard deviation if several."""
        values = [getattr(run, score) for run in self.runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    def mean_top1(self) -> float:
        """Return the mean top-1 over the seeds, in %."""
        return statistics.mean(run.top1 for run in self.runs)

    def told_changes(self) -> str:
        """Return the options that were set otherwise than in the recipe, or 'none'."""
        return ", ".join(f"{name} {value}" for name, value in self.changes.items()) or "none"


@dataclass(frozen=True)
class Results:
    """All rows by architecture and tag: those whose weights ship, and those that are on record.

    `setups` is the paper's table as `results.json` holds it: by setup and role a model, the
    paper's top-1 and the name of our row.
    """

    setups: dict[str, Any]
    weights: dict[str, Row]
    runs: dict[str, Row]

    @classmethod
    def load(cls) -> Results:
        """Read the file that comes with the package."""
        return cls.from_dict(json.loads(PATH.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Results:
        """Read what the file holds."""
        weights, runs = (
            {name: Row.from_dict(row) for name, row in values[part].items()}
            for part in ("weights", "runs")
        )
        return cls(values["setups"], weights, runs)

    def save(self) -> None:
        """Write the file."""
        content = dict(
            setups=self.setups,
            weights={name: row.to_dict() for name, row in self.weights.items()},
            runs={name: row.to_dict() for name, row in self.runs.items()},
        )
        PATH.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def rows(self) -> dict[str, Row]:
        """All rows, those whose weights ship first."""
        return self.weights | self.runs


def _missing(kind: Any, values: dict[str, Any]) -> list[str]:
    required = (
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    )
    return [name for name in required if name not in values]


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return values by the names of a dataclass's fields, of which none may be another."""
    names = [each.name for each in dataclasses.fields(kind)]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"results has {', '.join(unknown)}, which is none of {', '.join(names)}")
    return dict(values)


def _told(one: Any) -> dict[str, Any]:
    """Return a dataclass's fields, in order, without those at an optional one's default."""
    told = {}
    for each in dataclasses.fields(one):
        value = getattr(one, each.name)
        default = each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if value != default or each.name in ("processes", "file"):
            told[each.name] = value
    return told

"""Write the tables and commands of the documents from gld_zoo/results.json.

    python train/card.py

What is written stands between `<!-- results:NAME -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gld_zoo.results import METHODS, ROLES, Results, Row

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    CHECKOUT / name
    for name in ("README.md", "MODEL_CARD.md", "docs/method.md", "docs/reproduce.md")
]
STEPS = CHECKOUT / "benchmarks" / "results" / "methods.json"  # what a step costs


def setups_table(results: Results) -> list[str]:
    """Return one line a setup: ours at the last epoch, the paper's in brackets."""
    titles = [
        "setup",
        "teacher → student",
        "epochs each (paper)",
        "teacher",
        "student alone",
        "GLD",
    ]
    lines = []
    for setup, row, ours in setups_of(results, the_papers=True):
        scores = [
            f"{mean_of(each)} ({paper_score(row[role])})"
            for role, each in zip(ROLES, ours, strict=True)
        ]
        epochs = f"{all_epochs(ours, results)} ({row['paper_epochs']})"
        lines.append([setup, pair_of(row), epochs, *scores])
    return table(titles, lines)


def own_table(results: Results) -> list[str]:
    """Return one line a setup that is no row of the paper, at the last epoch."""
    titles = ["teacher → student", "images", "epochs each", "teacher", "student alone", "GLD"]
    lines = [
        [pair_of(row), row["dataset"], all_epochs(ours, results), *map(mean_of, ours)]
        for _, row, ours in setups_of(results, the_papers=False)
    ]
    return table(titles, lines)


def methods_table(results: Results) -> list[str]:
    """Return one line a method of each setup in which several were trained alike, with its cost."""
    titles = ["setup", "method", "recipe, changes", "epochs", "top-1", "above labels", "a step"]
    measured = json.loads(STEPS.read_text(encoding="utf-8"))
    lines = []
    for setup, roles in results.setups.items():
        names = {each: roles.get(f"method_{each}", {}).get("weights") for each in METHODS}
        rows = {each: results.rows[name] for each, name in names.items() if name}
        costs = measured["times of alone"] if setup == measured["setup"] else {}
        alone = rows.get("alone")
        for each, row in rows.items():
            gain = f"{row.mean_top1() - alone.mean_top1():+.2f}" if alone else "-"
            cost = f"{costs[each]:.2f}" if each in costs else "-"
            cells = [setup, METHODS[each], f"{row.recipe}, {row.told_changes()}", str(row.epochs)]
            lines.append([*cells, row.mean(), gain, cost])
    return table(titles, lines)


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown."""
    rule = "|---" * len(titles) + "|"
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(cells)} |" for cells in lines)]


def setups_of(
    results: Results, *, the_papers: bool
) -> Iterator[tuple[str, dict[str, Any], list[Row | None]]]:
    """Yield the setups of which there are rows: name, what results.json holds, and the rows."""
    for setup, row in results.setups.items():
        ours = [results.rows.get(row[role]["weights"]) for role in ROLES]
        if any(ours) and the_papers == bool(row["paper_epochs"]):
            yield setup, row, ours


def pair_of(setup: dict[str, Any]) -> str:
    """Return a setup's teacher and student."""
    return f"{setup['teacher']['model']} → {setup['gld']['model']}"


def all_epochs(rows: list[Row | None], results: Results) -> str:
    """Return the epochs of a setup's rows."""
    return ", ".join(epochs_of(each, results.rows) for each in rows)


def weights_table(results: Results) -> list[str]:
    """Return one line a row of runs: what it is, how it was trained, last and best epoch."""
    titles = ["weights", "parameters", "top-1", "top-5", "recipe, changes", "seeds", "on"]
    titles += ["hours", "best epoch"]
    lines = []
    for name, row in results.rows.items():
        cells = [
            f"`{name}`" if row.file else f"(`{name}`)",
            f"{row.parameters:,}",
            row.mean(),
            row.mean("top5"),
            f"{row.recipe}, {row.told_changes()}",
            ", ".join(str(run.seed) for run in row.runs),
            f"{row.hardware}, {row.precision}",
            f"{sum(run.hours or 0 for run in row.runs):.1f}",
            "; ".join(f"{run.best_epoch_top1:.2f} at {run.best_epoch}" for run in row.runs),
        ]
        lines.append(cells)
    return table(titles, lines)


def shipped_table(results: Results) -> list[str]:
    """Return one line a set of weights that ships: what it is and what it scores."""
    titles = ["weights", "taught by", "parameters", "epochs", "top-1", "top-5"]
    lines = []
    for name, row in results.weights.items():
        teacher = f"`{row.teacher.name}`" if row.teacher else "labels alone"
        cells = [f"`{name}`", teacher, f"{row.parameters:,}", epochs_of(row, results.rows)]
        lines.append([*cells, row.mean(), row.mean("top5")])
    return table(titles, lines)


def commands(results: Results) -> list[str]:
    """Return a block of one command a run, those without a teacher first."""
    lines, taken = [], set()
    for name, row in sorted(results.rows.items(), key=lambda item: item[1].teacher is not None):
        for seed in (run.seed for run in row.runs):
            # without its teacher a recipe makes another thing, whose folder it is not
            folder = (row.recipe, seed, "teacher" in row.changes)
            own = folder in taken or folder[-1]
            lines.append(command(name, row, seed, own_folder=own))
            taken.add(folder)
    return ["```bash", *lines, "```"]


def command(name: str, row: Row, seed: int, *, own_folder: bool) -> str:
    """Return the command that repeats a run, perhaps in a folder other than its recipe's."""
    options: dict[str, Any] = dict(config=row.recipe, **row.changes, seed=seed)
    if own_folder:
        options["run"] = f"runs/{name}-{seed}"
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in options.items()
    }
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return shlex.join([*launcher(row), *words])


def launcher(row: Row) -> list[str]:
    """Return what starts a row's processes.

    All that Accelerate's launcher would else warn of is told it; on a CPU it starts one process,
    whatever it is told, so that several are torchrun's there.
    """
    count, precision = str(row.processes), row.precision
    settings = [f"ACCELERATE_MIXED_PRECISION={precision}"] if precision != "float32" else []
    if count == "1":
        return [*settings, "gld-zoo", "distill"]
    program = "gld_zoo.training.distill"
    if row.hardware.startswith("cpu"):
        launched = ["ACCELERATE_USE_CPU=true", *settings, "torchrun", "--nproc_per_node", count]
        return [*launched, "-m", "--", program]  # after -- torchrun does not take --run
    precision = "no" if precision == "float32" else precision
    options = ["--num_processes", count, "--num_machines", "1", "--mixed_precision", precision]
    return [
        "accelerate",
        "launch",
        "--multi_gpu",
        *options,
        "--dynamo_backend",
        "no",
        "-m",
        program,
    ]


def epochs_of(row: Row | None, rows: dict[str, Row]) -> str:
    """Return a row's epochs, after those of the weights that it began with."""
    if row is None:
        return "-"
    start = row.changes.get("student")
    before = f"{epochs_of(rows[start], rows)} + " if start in rows else ""
    return f"{before}{row.epochs}"


def paper_score(role: dict[str, Any]) -> str:
    """Return the paper's top-1, if it has that row."""
    return "-" if role["paper_top1"] is None else f"{role['paper_top1']:.2f}"


def mean_of(row: Row | None) -> str:
    """Return a row's mean top-1 over its seeds, if there is such a row."""
    return "-" if row is None else row.mean()


BLOCKS: dict[str, Callable[[Results], list[str]]] = {
    "setups": setups_table,
    "own": own_table,
    "methods": methods_table,
    "weights": weights_table,
    "shipped": shipped_table,
    "commands": commands,
}


def fill(text: str, results: Results) -> str:
    """Return a document with its blocks rewritten."""

    def block(match: re.Match[str]) -> str:
        return "\n".join([match[1], *BLOCKS[match[2]](results), match[3]])

    return re.sub(r"(<!-- results:(\w+) -->)\n.*?(<!-- /results -->)", block, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the blocks of all documents."""
    results = Results.load()
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

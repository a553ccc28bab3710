"""Write the tables and commands of README.md and MODEL_CARD.md from gld_zoo/results.json.

    python train/card.py

What is written stands between `<!-- results:NAME -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gld_zoo.hub import describe_changes

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = [CHECKOUT / "README.md", CHECKOUT / "MODEL_CARD.md"]
ROLES = ("teacher", "alone", "gld")


def setups_table(results: dict[str, Any]) -> list[str]:
    """Return one line a setup: ours at the last epoch, the paper's in brackets."""
    lines = [
        "| setup | teacher → student | epochs each (paper) | teacher | student alone | GLD |",
        "|---|---|---|---|---|---|",
    ]
    trained = results["weights"] | results["runs"]
    for setup, row in results["setups"].items():
        entries = [trained.get(row[role]["weights"]) for role in ROLES]
        if not any(entries):
            continue
        pair = f"{row['teacher']['model']} → {row['gld']['model']}"
        epochs = ", ".join(epochs_of(entry, trained) for entry in entries)
        scores = [
            f"{score(entry)} ({paper_score(row[role])})"
            for role, entry in zip(ROLES, entries, strict=True)
        ]
        cells = [setup, pair, f"{epochs} ({row['paper_epochs'] or '-'})", *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def weights_table(results: dict[str, Any]) -> list[str]:
    """Return one line a row of runs: what it is, how it was trained, last and best epoch."""
    titles = ["weights", "parameters", "top-1", "top-5", "recipe, changes", "seeds", "on"]
    titles += ["hours", "best epoch"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, entry in (results["weights"] | results["runs"]).items():
        best = "; ".join(
            f"{run['best_epoch_top1']:.2f} at {run['best_epoch']}" for run in entry["runs"]
        )
        cells = [
            f"`{name}`" if entry["file"] else f"(`{name}`)",
            f"{entry['parameters']:,}",
            score(entry),
            score(entry, "top5"),
            f"{entry['recipe']}, {describe_changes(entry)}",
            ", ".join(str(run["seed"]) for run in entry["runs"]),
            f"{entry['hardware']}, {entry['precision']}",
            f"{sum(run['hours'] for run in entry['runs']):.1f}",
            best,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def commands(results: dict[str, Any]) -> list[str]:
    """Return a block of one command a run, those without a teacher first."""
    trained = results["weights"] | results["runs"]
    lines, taken = [], set()
    for name, entry in sorted(trained.items(), key=lambda item: item[1]["teacher"] is not None):
        for seed in (run["seed"] for run in entry["runs"]):
            folder = (entry["recipe"], seed)
            lines.append(command(name, entry, seed, own_folder=folder in taken))
            taken.add(folder)
    return ["```bash", *lines, "```"]


def command(name: str, entry: dict[str, Any], seed: int, *, own_folder: bool) -> str:
    """Return the command that repeats a run, perhaps in a folder other than its recipe's."""
    options: dict[str, Any] = dict(config=f"train/recipes/{entry['recipe']}.yaml")
    options |= entry["changes"] | dict(seed=seed)
    if own_folder:
        options["run"] = f"runs/{name}-{seed}"
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in options.items()
    }
    words = [word for key, value in values.items() for word in (f"--{key}", value)]
    return shlex.join([*launcher(entry), "train/distill.py", *words])


def launcher(entry: dict[str, Any]) -> list[str]:
    """Return what starts a row's processes; on a CPU Accelerate starts one, whatever it is told."""
    on_cpu, precision = entry["hardware"].startswith("cpu"), entry["precision"]
    count = str(entry["processes"])
    if on_cpu and count != "1":
        settings = ["ACCELERATE_USE_CPU=true", f"ACCELERATE_MIXED_PRECISION={precision}"]
        used = settings if precision != "float32" else settings[:1]
        return [*used, "torchrun", "--nproc_per_node", count, "--"]
    words = ["accelerate", "launch"]
    if on_cpu:
        words.append("--cpu")
    if count != "1":
        words += ["--num_processes", count]
    if precision != "float32":
        words += ["--mixed_precision", precision]
    return words


def epochs_of(entry: dict[str, Any] | None, trained: dict[str, Any]) -> str:
    """Return a row's epochs, after those of the weights that it began with."""
    if entry is None:
        return "-"
    start = entry["changes"].get("student")
    before = f"{epochs_of(trained[start], trained)} + " if start in trained else ""
    return f"{before}{entry['epochs']}"


def paper_score(role: dict[str, Any]) -> str:
    """Return the paper's top-1, if it has that row."""
    return "-" if role["paper_top1"] is None else f"{role['paper_top1']:.2f}"


def score(entry: dict[str, Any] | None, key: str = "top1") -> str:
    """Return a mean over seeds, with the standard deviation where there are several."""
    if entry is None:
        return "-"
    values = [run[key] for run in entry["runs"]]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


BLOCKS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "setups": setups_table,
    "weights": weights_table,
    "commands": commands,
}


def fill(text: str, results: dict[str, Any]) -> str:
    """Return a document with its blocks rewritten."""

    def block(match: re.Match[str]) -> str:
        return "\n".join([match[1], *BLOCKS[match[2]](results), match[3]])

    return re.sub(r"(<!-- results:(\w+) -->)\n.*?(<!-- /results -->)", block, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the blocks of all documents."""
    results = json.loads((CHECKOUT / "gld_zoo" / "results.json").read_text(encoding="utf-8"))
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write the tables of README.md and MODEL_CARD.md from gld_zoo/results.json.

    python train/card.py

A table stands between `<!-- results:NAME -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = [CHECKOUT / "README.md", CHECKOUT / "MODEL_CARD.md"]
ROLES = ("teacher", "alone", "gld")


def setups_table(results: dict[str, Any]) -> list[str]:
    """Return one line a setup: ours at the last epoch, the paper's in brackets."""
    lines = [
        "| setup | teacher → student | epochs (paper) | teacher | student alone | student, GLD |",
        "|---|---|---|---|---|---|",
    ]
    trained = results["weights"] | results["runs"]
    for setup, row in results["setups"].items():
        entries = [trained.get(row[role]["weights"]) for role in ROLES]
        if not any(entries):
            continue
        pair = f"{row['teacher']['model']} → {row['gld']['model']}"
        epochs = ", ".join(str(entry["epochs"]) if entry else "-" for entry in entries)
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
        changes = ", ".join(f"{key} {value}" for key, value in entry["changes"].items()) or "none"
        best = "; ".join(
            f"{run['best_epoch_top1']:.2f} at {run['best_epoch']}" for run in entry["runs"]
        )
        cells = [
            f"`{name}`" if entry["file"] else f"(`{name}`)",
            f"{entry['parameters']:,}",
            score(entry),
            score(entry, "top5"),
            f"{entry['recipe']}, {changes}",
            ", ".join(str(run["seed"]) for run in entry["runs"]),
            f"{entry['hardware']}, {entry['precision']}",
            f"{sum(run['hours'] for run in entry['runs']):.1f}",
            best,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "setups": setups_table,
    "weights": weights_table,
}


def fill(text: str, results: dict[str, Any]) -> str:
    """Return a document with its tables rewritten."""

    def table(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](results), match[3]])

    return re.sub(r"(<!-- results:(\w+) -->)\n.*?(<!-- /results -->)", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the tables of all documents."""
    results = json.loads((CHECKOUT / "gld_zoo" / "results.json").read_text(encoding="utf-8"))
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

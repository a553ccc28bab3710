"""Time and peak memory of the relation's forms, against the definition with its N x N matrices.

    OMP_NUM_THREADS=1 python benchmarks/relation.py --out relation.json --plot relation.png

Value and gradient in float32. `auto` is what the loss runs: the form that
`gld_zoo.distillation.relations` chooses by shape. Memory is measured in a fresh process a form and
shape.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measuring import interleave, peak_memory, ratio

from gld_zoo import relation
from gld_zoo.distillation import relations

LIMIT = 8e9  # bytes of N x N matrices that the definition may hold
MATRICES = 6  # float32, held at once: the distances and their rows over norm, twice; gradients
FORMS = ("auto", "linear", "plain", "matrix")


def matrix_form(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Evaluate the definition as it is written, by autograd through two N x N matrices."""

    def distances(rows: torch.Tensor) -> torch.Tensor:
        squares = rows.square().sum(1)
        squared = (squares[:, None] + squares - 2 * rows @ rows.T).clamp(min=0)
        return squared / squared.norm(dim=1, keepdim=True)

    with torch.no_grad():
        wanted = distances(teacher)
    return (wanted - distances(student)).square().mean()


def run(form: str, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Work out the value and the student's gradient once."""
    student.grad = None
    chosen = relations._linear_is_cheaper
    if form in ("linear", "plain"):
        relations._linear_is_cheaper = lambda rows, classes: form == "linear"
    compute = matrix_form if form == "matrix" else relation
    compute(student, teacher).backward()
    relations._linear_is_cheaper = chosen


def inputs(batch: int, cells: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits `[B(1+L), K]` of a student that requires a gradient, and of a teacher."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, batch * (1 + cells), classes)
    return student.requires_grad_(), teacher


def measure(batch: int, cells: int, classes: int, *, seconds: float) -> dict:
    """Time every form that fits at a shape."""
    rows = batch * (1 + cells)
    needed = MATRICES * 4 * rows**2
    result: dict = dict(batch=batch, cells=cells, classes=classes, rows=rows)
    student, teacher = inputs(batch, cells, classes)
    forms = [name for name in FORMS if name != "matrix" or needed <= LIMIT]
    if rows**2 * classes > 2e11:  # minutes for the plain form
        forms.remove("plain")
    if "matrix" not in forms:
        result["matrix"] = f"not run, needs {needed / 1e9:.0f} GB"
    calls = {form: lambda form=form: run(form, student, teacher) for form in forms}
    times = interleave(calls, rounds=2, seconds=seconds, warmup=1)
    result.update({form: round(statistics.median(ms), 3) for form, ms in times.items()})
    if "matrix" in times:
        result["matrix / auto"] = ratio(times, "matrix", "auto")
    return result


def added_memory(form: str, batch: int, cells: int, classes: int) -> float:
    """Return the MB that a form adds to its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--memory", form, *map(str, (batch, cells, classes))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(form: str, batch: int, cells: int, classes: int) -> None:
    """Print the growth of this process's peak memory, in MB."""
    run(form, *inputs(16, 4, 10))  # the libraries' own
    student, teacher = inputs(batch, cells, classes)
    before = peak_memory()
    run(form, student, teacher)
    print(peak_memory() - before)


def exponent(results: list[dict], cells: int, classes: int) -> float:
    """Return the slope of log time against log batch, from 256 images on."""
    points = [
        (math.log(r["batch"]), math.log(r["auto"]))
        for r in results
        if (r["cells"], r["classes"]) == (cells, classes) and r["batch"] >= 256
    ]
    xs, ys = zip(*points, strict=True)
    return statistics.linear_regression(xs, ys).slope


def plot(results: list[dict], path: Path) -> None:
    """Draw cost against batch at four cells and 100 classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for form in ("matrix", "plain", "linear", "auto"):
        points = [
            (r["batch"], r[form])
            for r in results
            if (r["cells"], r["classes"]) == (4, 100) and isinstance(r.get(form), float)
        ]
        if points:
            style = dict(color="black", linestyle="--") if form == "auto" else {}
            ax.plot(*zip(*points, strict=True), marker="o", label=form, **style)
    ax.set(xscale="log", yscale="log", xlabel="batch, images", ylabel="ms, value and gradient")
    ax.set_title("relation of 4 cells and 100 classes")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all shapes, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--cells", type=int, nargs="+", default=[4, 9, 16])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a shape")
    parser.add_argument("--no_memory", action="store_true", help="time alone")
    parser.add_argument("--out", type=Path, help="JSON of all results")
    parser.add_argument("--plot", type=Path, help="PNG of cost against batch")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        form, *shape = options.memory
        print_memory(form, *map(int, shape))
        return
    results = []
    for classes in options.classes:
        for cells in options.cells:
            for batch in options.batches:
                result = measure(batch, cells, classes, seconds=options.seconds)
                if not options.no_memory:
                    result["MB"] = {
                        form: round(added_memory(form, batch, cells, classes), 1)
                        for form in FORMS
                        if isinstance(result.get(form), float)
                    }
                results.append(result)
                print(json.dumps(result), flush=True)
            if len(options.batches) > 2:
                slope = exponent(results, cells, classes)
                print(f"exponent in B, L={cells}, K={classes}: {slope:.2f}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()

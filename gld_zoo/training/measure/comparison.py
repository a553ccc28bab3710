"""Several models on one test split: a table, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from gld_zoo.training.common.disk import replacing
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.evaluation import of_scores
from gld_zoo.training.measure.inputs import build_measured, measuring_batches
from gld_zoo.training.measure.scores import Scores, collect


def compare(
    names: Sequence[str],
    source: ImageSource,
    *,
    image_size: int | None = None,
    batch_size: int = 250,
    workers: int = 0,
    device: torch.device,
) -> dict[str, Any]:
    """Measure several models on a dataset's test split.

    Args:
        names: Each a timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.
        source: The dataset, whose classes they have.
        image_size: Side in pixels for all; None takes each model's own.
        batch_size: Images a forward pass.
        workers: Processes that read images; 0 decodes them into memory where they fit.
        device: Where to run.

    Returns:
        The dataset, its number of images, and of each of `models` what `evaluate` tells; how its
        top-1 differs from the first one's, `gain` with the standard error of that, in points; and
        `agreement`, the share of images in % that it and each of the models give the same class.

    Raises:
        DataError: If the dataset does not fit.
        ModelError: If a model does not.
    """
    labels, results, collected = source.label_names, [], []
    built = [
        build_measured(name, device, image_size=image_size, label_names=labels) for name in names
    ]
    for name, measured in zip(names, built, strict=True):
        batches = measuring_batches(source.test, measured, device, batch_size, workers)
        scores = collect(measured.model, batches, 0)
        results.append(dict(model=name, **of_scores(scores, measured, device)))
        collected.append(scores)
    for result, scores in zip(results, collected, strict=True):
        result["gain"], result["gain_error"] = gain(scores, collected[0])
        result["agreement"] = [scores.agreement(other) for other in collected]
    return dict(dataset=source.name, images=len(collected[0].target), models=results)


def gain(scores: Scores, other: Scores) -> tuple[float, float]:
    """Return by how many points a top-1 is above another's, and the standard error of that.

    Both are of the same images, so only those that one of the two has right count. The error is
    that of drawing the images; another seed of the training is not in it.
    """
    right, others = (
        (each.logits[:, 0].argmax(1) == each.target).double() for each in (scores, other)
    )
    difference = right - others
    error = difference.std(correction=0) / math.sqrt(len(difference))
    return 100 * difference.mean().item(), 100 * error.item()


def comparison_table(result: dict[str, Any]) -> str:
    """Return what `compare` found as a table, a line a model."""
    models = result["models"]
    width = max(len("model"), *(len(each["model"]) + 4 for each in models))
    titles = ["top-1 %", "than the first", "top-5 %", "parameters", "MACs", "images/s", "agrees %"]
    widths = [9, 17, 9, 12, 9, 10, 10]
    lines = [
        f"{result['dataset']}: {result['images']:,} test images",
        "model".ljust(width)
        + "".join(title.rjust(size) for title, size in zip(titles, widths, strict=True)),
    ]
    for number, each in enumerate(models, 1):
        change = f"{each['gain']:+.2f} ± {each['gain_error']:.2f}" if number > 1 else "-"
        cells = [f"{each['top1']:.2f}", change, f"{each['top5']:.2f}", f"{each['parameters']:,}"]
        cells += [_in_millions(each["macs"]), f"{each['images_per_second']:,.0f}"]
        cells += [f"{each['agreement'][0]:.1f}" if number > 1 else "-"]
        lines.append(
            f"{number}  {each['model']}".ljust(width)
            + "".join(cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
        )
    lines.append(
        "± is the standard error over these images (another seed of the training comes on top); "
        "agrees: gives the same class as the first"
    )
    return "\n".join(lines)


def _in_millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count < 1e9 else f"{count / 1e9:,.2f}G"


def draw_comparison(result: dict[str, Any], path: Path) -> None:
    """Draw top-1 against images/s, a dot's area its parameters, beside who agrees with whom.

    Args:
        result: What `compare` returned.
        path: PNG to write.

    Raises:
        DiskError: If it cannot be written.
    """
    models = result["models"]
    numbers = [str(number) for number in range(1, len(models) + 1)]
    figure = Figure(figsize=(9, 3.6 + 0.2 * len(models)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    largest = max(each["parameters"] for each in models)
    for number, each in zip(numbers, models, strict=True):
        area = 30 + 500 * each["parameters"] / largest
        speed, top1 = each["images_per_second"], each["top1"]
        label = f"{number}: {each['model']}, {each['parameters']:,} parameters"
        (drawn,) = left.plot([], [], "o", label=label)
        left.scatter(speed, top1, s=area, alpha=0.6, color=drawn.get_color())
        share = top1 / 100
        error = 100 * math.sqrt(share * (1 - share) / result["images"])
        left.errorbar(speed, top1, error, color=drawn.get_color(), capsize=3)
        left.annotate(number, (speed, top1), ha="center", va="center", fontsize=8)
    left.set(
        xscale="log",
        xlabel="images/s of this machine, forward pass alone",
        ylabel="top-1, %, ± standard error",
    )
    for formatted in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    left.grid(alpha=0.3, which="both")
    left.margins(0.2)
    shares = [each["agreement"] for each in models]
    right.imshow(shares, vmin=0, vmax=100, cmap="viridis")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            colour = "white" if share < 60 else "black"
            right.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    right.set_xticks(range(len(models)), numbers)
    right.set_yticks(range(len(models)), numbers)
    right.set_title("same class, % of the images", fontsize=10)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")

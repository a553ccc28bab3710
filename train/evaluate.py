"""Measure a model on a dataset: accuracy, local rows, calibration, agreement, size and speed.

    python train/evaluate.py --model gld_wrn16_1 --dataset uoft-cs/cifar100
    python train/evaluate.py --model runs/mine-0 --dataset DIR --teacher gld_wrn16_2 --json out.json

In float32, with the preprocessing of the model's cfg; images/s is the forward pass alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from torch.utils.flop_counter import FlopCounterMode

from batches import EvalBatches, Share
from disk import DiskError, replacing, write_text
from gld_zoo import global_local_logits
from gld_zoo.output import end, printing
from loaders import eval_batches
from models import ModelError, Teacher, create_frozen, measuring_device, refusals
from rows import DataError, Rows
from scores import predict
from sources import ImageSource, open_source

WORST = 10  # classes that the table shows


def evaluate(
    name: str,
    source: ImageSource,
    *,
    teacher: str | None = None,
    grid: int = 2,
    image_size: int | None = None,
    batch_size: int = 250,
    workers: int = 0,
    mirror: bool = False,
    picture: Path | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure a model on a dataset's test split.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.
        source: The dataset.
        teacher: Such a name too, to compare with; it sees the same pixels in its own scale.
        grid: Cells along each side of the feature map; 0 leaves the local rows out.
        image_size: Side in pixels; None takes the model's.
        batch_size: Images a forward pass.
        workers: Processes that read images; 0 decodes them once into memory where they fit.
        mirror: Average the model's logits over each image and its mirror image.
        picture: PNG to draw the confusion of classes to.
        device: Where to run.

    Raises:
        DataError: If the dataset does not fit.
        DiskError: If the picture cannot be written.
        ModelError: If a model does not.
    """
    labels = source.label_names
    model = create_frozen(resolve_name(name), device, label_names=labels)
    config = resolve_model_data_config(model)
    size, mean, std = square_size(config, image_size), config["mean"], config["std"]
    check_takes(name, model, size, device)
    reference = None
    if teacher:  # before the images are read, so that its mistakes cost nothing
        theirs = create_frozen(resolve_name(teacher), device, label_names=labels, role="teacher")
        check_takes(teacher, theirs, size, device)
        reference = Teacher(theirs, None, mean, std)
    missing = missing_local_rows(model, size, grid, device)
    batches = measuring_batches(
        source.test, config, size, device, batch_size=batch_size, workers=workers
    )
    scores = predict(model, batches, 0 if missing else grid, mirror=mirror)
    result: dict[str, Any] = dict(
        model=name,
        dataset=source.name,
        images=len(scores.target),
        image_size=size,
        top1=scores.top(1),
        top5=scores.top(5),
        calibration_error=scores.calibration_error(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        macs=count_macs(model, size, device),
        images_per_second=len(scores.target) / scores.seconds,
        mirror=mirror,
        class_top1=dict(zip(labels, scores.top1_by_class(), strict=True)),
    )
    if picture:
        with replacing(picture) as temporary:
            draw_confusion(scores.confusion(), labels, temporary)
    if grid:
        rows = range(1, scores.logits.shape[1])
        result.update(local_top1=missing or [scores.top(1, row) for row in rows])
    if reference:
        guesses = predict(reference.classify, batches, 0)
        result.update(
            teacher=teacher, teacher_top1=guesses.top(1), agreement=scores.agreement(guesses)
        )
    return result


def square_size(config: dict[str, Any], image_size: int | None) -> int:
    """Return the side of a model's images in pixels: the one asked for, or its cfg's.

    Raises:
        ModelError: If its cfg has other images than square ones and no size is asked for.
    """
    height, width = config["input_size"][1:]
    if image_size is None and height != width:
        raise ModelError(
            f"the model's images are {height}x{width}, and only square ones are supported; choose "
            "a side by --image_size"
        )
    return image_size or width


def measuring_batches(
    rows: Rows,
    config: dict[str, Any],
    size: int,
    device: torch.device,
    *,
    batch_size: int = 250,
    workers: int = 0,
) -> EvalBatches:
    """Return images as a model's cfg asks for them, of a side in pixels.

    Raises:
        DataError: If an image or a label cannot be used.
    """
    return eval_batches(
        rows,
        config,
        size,
        device,
        batch_size=batch_size,
        share=Share(),
        workers=workers,
        in_memory=False if workers else None,
    )


def check_takes(name: str, model: Any, size: int, device: torch.device) -> None:
    """Refuse a size of images that a model cannot take before they are read.

    Raises:
        ModelError: If it cannot.
    """
    with refusals(f"model {name!r}", size):
        model(torch.zeros(1, 3, size, size, device=device))


@torch.no_grad()
def missing_local_rows(model: Any, size: int, grid: int, device: torch.device) -> str | None:
    """Return why a model has no local rows; None if it has, or if `grid` is 0."""
    if not grid:
        return None
    try:
        global_local_logits(model, torch.zeros(1, 3, size, size, device=device), grid)
    except ValueError as error:
        return f"none: {error}"
    return None


@torch.no_grad()
def count_macs(model: Any, size: int, device: torch.device) -> int:
    """Return the multiplications of an image's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops() // 2


def resolve_name(name: str) -> str:
    """Return what timm loads: a run folder's `last/`, or the name itself.

    Raises:
        ModelError: If a run folder holds no finished run.
    """
    if (Path(name) / "last" / "config.json").is_file():
        return f"local-dir:{name}/last"
    if (Path(name) / "recipe.yaml").is_file():
        raise ModelError(f"{name} holds no finished run; go on with it by --resume")
    return name


def table(result: dict[str, Any]) -> str:
    """Return a result as lines of name and value for people."""
    percent = ("top1", "top5", "train_top1", "teacher_top1", "agreement", "calibration_error")
    units = dict.fromkeys(percent, "%") | dict(image_size="px", images_per_second="")
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            name, text = f"worst {WORST} classes", worst_classes(value)
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, list):
            text = "  ".join(f"{item:.2f}" for item in value) + " %"
        elif isinstance(value, float):
            text = f"{value:.2f} {units[name]}" if name in units else f"{value:g}"
        else:
            text = f"{value:,} {units.get(name, '')}" if isinstance(value, int) else value
        lines.append(f"{name.replace('_', ' '):<18} {text.strip()}")
    return "\n".join(lines)


def worst_classes(top1: dict[str, float | None]) -> str:
    """Return the classes of the lowest top-1, in words; those without images are left out."""
    measured = [(value, name) for name, value in top1.items() if value is not None]
    return ", ".join(f"{name} {value:.1f} %" for value, name in sorted(measured)[:WORST])


def draw_confusion(matrix: torch.Tensor, names: Sequence[str], path: Path) -> None:
    """Draw which class was taken for which, in % of each class's images.

    Args:
        matrix: Images `[K, K]` of each class by the class given.
        names: Of the classes; more than 40 are numbered by the axes instead.
        path: PNG to write.
    """
    share = 100 * matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    few = len(names) <= 40
    side = 3 + 0.25 * len(names) if few else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(share, cmap="viridis", vmin=0, vmax=100)
    if few:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="class given", ylabel="class", title="% of each class's images")
    figure.colorbar(drawn, shrink=0.7)
    figure.savefig(path, dpi=110, format="png")


def add_source_options(parser: ArgumentParser, *, positional: bool = False) -> None:
    """Give a parser the options that name a dataset, its splits and columns.

    Args:
        parser: To add to.
        positional: Whether the dataset is given without the name of an option.
    """
    if positional:
        parser.add_argument("dataset", type=str, help="hub id or folder")
    else:
        parser.add_argument("--dataset", type=str, required=True, help="hub id or folder")
    parser.add_argument("--dataset_config", type=str | None, help="name of one of its configs")
    parser.add_argument("--dataset_revision", type=str | None, help="branch, tag or commit")
    parser.add_argument("--train_split", type=str, default="train", help="split of training images")
    parser.add_argument("--test_split", type=str | None, help="null: 'test', else 'validation'")
    parser.add_argument(
        "--test_fraction", type=float, default=0.0, help="of train, as it was set for a run"
    )
    parser.add_argument(
        "--image_column", type=str | None, help="null: the only one of images, or the usual name"
    )
    parser.add_argument(
        "--label_column", type=str | None, help="null: the only one of classes, or the usual name"
    )


@printing(failed=end)
def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    model = "timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder"
    parser.add_argument("--model", type=str, required=True, help=model)
    parser.add_argument("--teacher", type=str | None, help=f"compare with it: {model}")
    add_source_options(parser)
    parser.add_argument(
        "--grid", type=NonNegativeInt, default=2, help="cells a side; 0: no local rows"
    )
    parser.add_argument(
        "--image_size", type=PositiveInt | None, help="pixels a side; null: the model's"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=250, help="images a forward pass")
    parser.add_argument(
        "--workers",
        type=NonNegativeInt,
        default=0,
        help="processes that read images; 0: none, and in memory where they fit",
    )
    parser.add_argument(
        "--mirror", type=bool, default=False, help="mean of the logits over an image and its mirror"
    )
    parser.add_argument("--picture", type=Path | None, help="PNG of which class is taken for which")
    parser.add_argument("--json", type=str | None, help="file to write the result to")
    options = parser.parse_args(arguments)
    try:
        result = evaluate(
            options.model,
            open_source(options),
            teacher=options.teacher,
            grid=options.grid,
            image_size=options.image_size,
            batch_size=options.batch_size,
            workers=options.workers,
            mirror=options.mirror,
            picture=options.picture,
            device=measuring_device(),
        )
        print(table(result))
        if options.json:
            write_text(Path(options.json), json.dumps(result, indent=2) + "\n")
    except (DataError, DiskError, ModelError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()

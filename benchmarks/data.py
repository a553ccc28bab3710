"""Time each data path alone: images a second that reach the step, no model.

    python benchmarks/data.py --threads 2 --out data.json
    python benchmarks/data.py --dataset DIR --image_size 224 --crop resized --seconds 20

tensor         decoded once, kept in memory, augmented in batches
loader, N      read, decoded and transformed as needed, by N worker processes (0: by this one)
stream, N      the same from a stream, without a local copy

The rate leaves out the first batch, which is given as the seconds until it comes: it holds the
decoding of the whole set on the tensor path, and the start of the workers on the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gld_zoo.training.build.create import create_student, resolve_data_config
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Batch, Share, TrainBatches
from gld_zoo.training.data.loaders import load_data
from gld_zoo.training.data.sources import open_source


def paths(recipe: Recipe, workers: list[int]) -> dict[str, Recipe]:
    """Return the recipe of each path."""
    found = {}
    if recipe.crop == "padded":
        found["tensor"] = replace(recipe, in_memory=True)
    for count in workers:
        found[f"loader, {count}"] = replace(recipe, in_memory=False, workers=count)
    for count in workers:
        found[f"stream, {count}"] = replace(recipe, streaming=True, workers=count)
    return found


def endless(batches: TrainBatches) -> Iterator[Batch]:
    """Yield one epoch after another."""
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def measure(recipe: Recipe, seconds: float) -> dict[str, float]:
    """Return seconds to the first batch and images a second after it."""
    device = torch.device("cpu")
    source = open_source(recipe)
    student = create_student(recipe.student, source.label_names, device)
    config = resolve_data_config(student, recipe.image_size)
    began = time.perf_counter()
    batches = endless(load_data(source, recipe, config, device, Share()).train)
    next(batches)
    first = time.perf_counter()
    count = 0
    while time.perf_counter() < first + seconds:
        count += len(next(batches)[1])
    rate = count / (time.perf_counter() - first)
    return dict(first_batch_seconds=round(first - began, 2), images_per_second=round(rate))


def main() -> None:
    """Measure every path that the options allow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="gld_zoo/data/cifar100_mini", help="hub id or folder")
    parser.add_argument("--image_size", type=int, default=32, help="pixels a side")
    parser.add_argument("--crop", choices=("padded", "resized"), default="padded", help="of a run")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="to try")
    parser.add_argument("--train_images", type=int, help="of a stream whose card does not say it")
    parser.add_argument("--seconds", type=float, default=10, help="of timing, each path")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(
        student="gld_resnet20",
        dataset=options.dataset,
        image_size=options.image_size,
        crop=options.crop,
        batch_size=options.batch,
        train_images=options.train_images,
    )
    result = dict(
        dataset=options.dataset,
        image_size=options.image_size,
        crop=options.crop,
        batch=options.batch,
        threads=options.threads,
        paths={
            name: measure(each, options.seconds)
            for name, each in paths(recipe, options.workers).items()
        },
    )
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

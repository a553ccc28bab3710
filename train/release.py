r"""Put a finished run's student into the package: weights, logits, log, entry in results.json.

    python train/release.py runs/X --name gld_wrn16_1.wrn16_2_cifar100 \
        --recipe cifar100_wrn16_2_wrn16_1 --setup b --role gld --test_set uoft-cs/cifar100

Then register the tag in the model's file, and run `python train/card.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jsonargparse import ArgumentParser
from timm.task import ClassificationEvaluator

import gld_zoo  # noqa: F401  registers the models
from batches import Normalize, Share, Transforms
from loaders import eval_batches
from recipe import Recipe
from sources import CHECKOUT, ImageSource
from tensor_path import decode

PACKAGE = CHECKOUT / "gld_zoo"
RESULTS = PACKAGE / "results.json"
NOT_COMPARED = {"dataset", "teacher", "seed", "eval_batch_size", "keep_checkpoints", "compile"}


def release(run: Path, name: str, recipe_name: str, test_set: str) -> dict[str, Any]:
    """Copy a finished run's weights and log into the package; return their entry for results.json.

    Args:
        run: Finished run folder.
        name: Architecture and tag of the weights.
        recipe_name: Stem of the recipe that the run follows.
        test_set: Dataset on whose test split the copied file is measured, in float32.

    Raises:
        ValueError: If the run is not finished, its student is not the named architecture, or the
            copied file does not score what the run's log says.
    """
    if not (run / "summary.json").is_file():
        raise ValueError(f"{run} holds no finished run")
    recipe = Recipe.load(run / "recipe.yaml")
    architecture = name.split(".")[0]
    if recipe.student != architecture:
        raise ValueError(f"{run} trained {recipe.student}, not {architecture}")
    weights = PACKAGE / "weights" / f"{name}.safetensors"
    weights.parent.mkdir(exist_ok=True)
    shutil.copyfile(run / "last" / "model.safetensors", weights)
    shutil.copyfile(run / "metrics.jsonl", weights.with_name(f"{name}.metrics.jsonl"))
    overlay = dict(file=str(weights))
    model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    logits = json.dumps(stored_logits(model)) + "\n"
    weights.with_name(f"{name}.logits.json").write_text(logits, encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    scores, images = measure(model, test_set)
    if abs(scores["top1"] - summary["top1"]) > 0.01:
        raise ValueError(
            f"{name} scores {scores['top1']:.2f} %, its log says {summary['top1']:.2f}"
        )
    published = Recipe.load(CHECKOUT / "train" / "recipes" / f"{recipe_name}.yaml")
    return dict(
        teacher=published.teacher,
        recipe=recipe_name,
        changes=changes(recipe, published),
        epochs=recipe.epochs,
        schedule=f"SGD, batch {recipe.batch_size}, lr {recipe.lr:g} x{recipe.lr_decay:g} at "
        + " and ".join(f"{drop:.0%}" for drop in recipe.lr_drops),
        test_images=images,
        precision=environment["mixed_precision"],
        hardware=f"{environment['device']}, {environment['processor']}",
        versions=environment["versions"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file=weights.name,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        runs=[
            dict(
                seed=recipe.seed,
                top1=scores["top1"],
                top5=scores["top5"],
                best_epoch=summary["best_epoch"],
                best_epoch_top1=summary["best_epoch_top1"],
                hours=round(summary["seconds"] / 3600, 2),
                commit=environment["commit"],
            )
        ],
    )


@torch.no_grad()
def measure(model: Any, test_set: str) -> tuple[dict[str, float], int]:
    """Return top-1 and top-5 on a dataset's test split, and its number of images."""
    cfg = model.pretrained_cfg
    transforms = Transforms(cfg["input_size"][-1], cfg["interpolation"], crop_pct=cfg["crop_pct"])
    normalize = Normalize(cfg["mean"], cfg["std"], torch.device("cpu"))
    rows = ImageSource(test_set).test
    test = eval_batches(rows, transforms, normalize, batch_size=500, share=Share())
    evaluator = ClassificationEvaluator()
    for images, target in test:
        evaluator.update(model(images), target)
    return dict(evaluator.compute()), test.count


@torch.no_grad()
def stored_logits(model: Any) -> dict[str, Any]:
    """Return two bundled images uint8 `[2, H, W, 3]` and the logits `[2, K]` they must give."""
    cfg = model.pretrained_cfg
    rows = ImageSource(str(PACKAGE / "data" / "cifar100_mini")).test
    pixels = decode(rows, Transforms(cfg["input_size"][-1]).fit(), cfg["input_size"][-1]).images[:2]
    logits = model(Normalize(cfg["mean"], cfg["std"], pixels.device)(pixels))
    rounded = [[round(value, 5) for value in row] for row in logits.tolist()]
    return dict(images=pixels.tolist(), logits=rounded)


def changes(used: Recipe, published: Recipe) -> dict[str, Any]:
    """Return the options that decide a result and that a run changed from the recipe it names."""
    before, after = dataclasses.asdict(published), dataclasses.asdict(used)
    return {
        name: after[name]
        for name in after
        if name not in NOT_COMPARED and after[name] != before[name]
    }


def main() -> None:
    """Release one run."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--name", type=str, required=True, help="architecture.tag of the weights")
    parser.add_argument("--recipe", type=str, required=True, help="stem of the recipe it follows")
    parser.add_argument(
        "--test_set", type=str, required=True, help="dataset to measure the file on"
    )
    parser.add_argument("--setup", type=str, required=True, help="row of the paper in results.json")
    parser.add_argument(
        "--role", type=Literal["teacher", "alone", "gld"], required=True, help="there"
    )
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    entry = release(options.run, options.name, options.recipe, options.test_set)
    results["weights"][options.name] = entry
    results["setups"][options.setup][options.role]["weights"] = options.name
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{options.name}: top-1 {entry['runs'][0]['top1']:.2f} %, {entry['file']}")


if __name__ == "__main__":
    main()

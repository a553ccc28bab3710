"""Put a finished run's student into the package: weights, logits, log, entry in results.json.

    python train/release.py runs/X --name gld_wrn16_1.wrn16_2_cifar100 --setup b --role gld

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

import gld_zoo  # noqa: F401  registers the models
from loaders import CHECKOUT, ImageSource, Normalize
from recipe import Recipe

PACKAGE = CHECKOUT / "gld_zoo"
RESULTS = PACKAGE / "results.json"
LOCAL_OPTIONS = {
    "dataset",
    "seed",
    "eval_batch_size",
    "keep_checkpoints",
    "compile",
}  # do not change the result's meaning


def release(run: Path, name: str, setup: str, role: str, recipe_name: str) -> dict[str, Any]:
    """Copy a finished run's weights and log into the package and return its entry for results.json.

    Raises:
        ValueError: If the run is not finished or its student is not the named architecture.
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
    model = timm.create_model(f"local-dir:{run}/last", pretrained=True).eval()
    weights.with_name(f"{name}.logits.json").write_text(
        json.dumps(stored_logits(model)) + "\n", encoding="utf-8"
    )
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    return dict(
        setup=setup,
        role=role,
        teacher=recipe.teacher,
        recipe=recipe_name,
        changes=changes(
            recipe, Recipe.load(CHECKOUT / "train" / "recipes" / f"{recipe_name}.yaml")
        ),
        epochs=recipe.epochs,
        schedule=f"SGD, batch {recipe.batch_size}, lr {recipe.lr:g} x{recipe.lr_decay:g} at "
        + " and ".join(f"{drop:.0%}" for drop in recipe.lr_drops),
        precision=environment["mixed_precision"],
        hardware=f"{environment['device']}, {environment['processor']}",
        versions=environment["versions"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        file=weights.name,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        runs=[
            dict(
                seed=recipe.seed,
                top1=summary["top1"],
                top5=summary["top5"],
                best_epoch=summary["best_epoch"],
                best_epoch_top1=summary["best_epoch_top1"],
                hours=round(summary["seconds"] / 3600, 2),
                commit=environment["commit"],
            )
        ],
    )


@torch.no_grad()
def stored_logits(model: Any) -> dict[str, Any]:
    """Return two bundled images uint8 `[2, H, W, 3]` and the logits `[2, K]` they must give."""
    _, test = ImageSource(str(PACKAGE / "data" / "cifar100_mini")).decode(
        model.pretrained_cfg["input_size"][-1]
    )
    pixels = test.images[:2]
    images = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"], pixels.device)(
        pixels
    )
    return dict(
        images=pixels.tolist(),
        logits=[[round(value, 5) for value in row] for row in model(images).tolist()],
    )


def changes(used: Recipe, published: Recipe) -> dict[str, Any]:
    """Return the options that a run changed from the recipe it names."""
    before, after = dataclasses.asdict(published), dataclasses.asdict(used)
    return {
        name: after[name]
        for name in after
        if name not in LOCAL_OPTIONS and after[name] != before[name]
    }


def main() -> None:
    """Release one run."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--name", type=str, required=True, help="architecture.tag of the weights")
    parser.add_argument(
        "--recipe", type=str, required=True, help="recipe it follows, by its file's stem"
    )
    parser.add_argument("--setup", type=str, required=True, help="row of the paper in results.json")
    parser.add_argument(
        "--role", type=Literal["teacher", "alone", "gld"], required=True, help="part in that row"
    )
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    entry = release(options.run, options.name, options.setup, options.role, options.recipe)
    results["weights"][options.name] = entry
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"{options.name}: top-1 {entry['runs'][0]['top1']:.2f} %, {entry['file']}")


if __name__ == "__main__":
    main()

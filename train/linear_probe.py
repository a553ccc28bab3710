"""Linear transfer: the accuracy of a linear classifier on a frozen model's features.

    python train/linear_probe.py --config train/recipes/linear_stl10.yaml --model gld_wrn16_1
    python train/linear_probe.py --model runs/mine-0 --dataset DIR --json out.json

The pooled features of every image, prepared as the model's cfg says, and of its mirror image for
training, are computed once, in float32. On them multinomial logistic regression is fitted to its
optimum by L-BFGS, so that no schedule has a say. The L2 penalty is the best of a few on a tenth of
the training images, held out class by class; then all of them are used, and the test split is read
once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from timm.data import resolve_model_data_config

from batches import EvalBatches
from disk import DiskError, write_text
from evaluate import (
    add_source_options,
    check_takes,
    measuring_batches,
    resolve_name,
    square_size,
    table,
)
from gld_zoo.output import end, printing
from models import ModelError, create_frozen, measuring_device
from rows import DataError, Rows
from sources import ImageSource, open_source

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD_OUT = 0.1  # of the training images, to choose the penalty


def linear_probe(
    name: str,
    source: ImageSource,
    *,
    image_size: int | None = None,
    mirror: bool = True,
    batch_size: int = 250,
    workers: int = 0,
    seed: int = 0,
    device: torch.device,
) -> dict[str, Any]:
    """Fit a linear classifier to a frozen model's features and measure it on the test split.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder, of any classes.
        source: The dataset.
        image_size: Side in pixels; None takes the model's.
        mirror: Train on the mirror image of each image too.
        batch_size: Images a forward pass.
        workers: Processes that read images; 0 decodes them once into memory where they fit.
        seed: Of the images held out.
        device: Where to run.

    Raises:
        DataError: If the dataset does not fit.
        ModelError: If the model does not.
    """
    model = create_frozen(resolve_name(name), device)
    config = resolve_model_data_config(model)
    size = square_size(config, image_size)
    check_takes(name, model, size, device)
    check_features_fit(model, len(source.train), mirror)

    def extract(rows: Rows, *, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        batches = measuring_batches(
            rows, config, size, device, batch_size=batch_size, workers=workers
        )
        return pooled_features(model, batches, mirrored=mirrored)

    kept, held = (extract(rows, mirrored=mirror) for rows in source.train.hold_out(HELD_OUT, seed))
    selection = held[0][:, :1], held[1]  # as they are, not mirrored
    classes = len(source.label_names)
    penalty = max(PENALTIES, key=lambda value: score(fit(*kept, classes, value), *selection))
    features, target = (torch.cat(parts) for parts in zip(kept, held, strict=True))
    classifier = fit(features, target, classes, penalty)
    test = extract(source.test)
    return dict(
        model=name,
        dataset=source.name,
        train_images=len(target),
        test_images=len(test[1]),
        image_size=size,
        features=features.shape[-1],
        penalty=penalty,
        train_top1=score(classifier, features[:, :1], target),
        top1=score(classifier, *test),
    )


def check_features_fit(model: Any, images: int, mirror: bool) -> None:
    """Refuse features of more images than this machine has memory for.

    Raises:
        DataError: If they would not fit: as computed, standardised, and joined from two parts.
    """
    views = 2 if mirror else 1
    needed = images * views * model.head_hidden_size * (4 + 4 + 8 + 8)
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"the features of {images:,} images take {needed / 2**30:.0f} GiB, and "
            f"{free / 2**30:.0f} GiB are free; use fewer images"
            + (" or --mirror false" if mirror else "")
        )


@torch.no_grad()
def pooled_features(
    model: Any, batches: EvalBatches, *, mirrored: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled features `[N, V, D]` of a split, V = 2 views if mirrored, and classes `[N]`."""
    features, targets = [], []
    for images, target in batches:
        views = [images, images.flip(3)] if mirrored else [images]
        pooled = [model.forward_head(model.forward_features(v), pre_logits=True) for v in views]
        features.append(torch.stack(pooled, dim=1))
        targets.append(target)
    return torch.cat(features), torch.cat(targets)


class Classifier(torch.nn.Module):
    """A linear classifier of standardised features, in float64.

    Args:
        mean, std: Of the features, `[D]`.
        classes: K.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.weight = torch.nn.Parameter(mean.new_zeros(classes, len(mean)))
        self.bias = torch.nn.Parameter(mean.new_zeros(classes))

    def standardize(self, features: torch.Tensor) -> torch.Tensor:
        """Shift and scale features `[N, D]` to mean 0 and standard deviation 1 in training."""
        return (features.double() - self.mean) / self.std

    def forward(self, standardized: torch.Tensor) -> torch.Tensor:
        """Map standardised features `[N, D]` to logits `[N, K]`."""
        return F.linear(standardized, self.weight, self.bias)


def fit(features: torch.Tensor, target: torch.Tensor, classes: int, penalty: float) -> Classifier:
    """Fit multinomial logistic regression: mean cross-entropy + penalty / 2 · |weight|².

    Args:
        features: `[N, V, D]`, V views of each image.
        target: Classes `[N]`.
        classes: K.
        penalty: On the weights of standardised features, not on the bias.
    """
    target = target.repeat_interleave(features.shape[1])
    rows = features.flatten(0, 1).double()
    # a feature that never changes says nothing: leave it at 0 instead of dividing by it
    std = rows.std(0)
    classifier = Classifier(rows.mean(0), torch.where(std > 0, std, 1), classes)
    inputs = classifier.standardize(rows)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(),
        max_iter=1000,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(inputs), target)
        loss = loss + penalty / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cast(Any, closure))
    return classifier


@torch.no_grad()
def score(classifier: Classifier, features: torch.Tensor, target: torch.Tensor) -> float:
    """Return the top-1 in % on features `[N, 1, D]`."""
    guess = classifier(classifier.standardize(features[:, 0])).argmax(1)
    return 100 * (guess == target).double().mean().item()


@printing(failed=end)
def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file of options")
    name = "timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder"
    parser.add_argument("--model", type=str, required=True, help=name)
    add_source_options(parser)
    parser.add_argument(
        "--image_size", type=PositiveInt | None, help="pixels a side; null: the model's"
    )
    parser.add_argument("--mirror", type=bool, default=True, help="train on mirror images too")
    parser.add_argument("--batch_size", type=PositiveInt, default=250, help="images a forward pass")
    parser.add_argument(
        "--workers",
        type=NonNegativeInt,
        default=0,
        help="processes that read images; 0: none, and in memory where they fit",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images held out")
    parser.add_argument("--json", type=str | None, help="file to write the result to")
    options = parser.parse_args(arguments)
    try:
        result = linear_probe(
            options.model,
            open_source(options),
            image_size=options.image_size,
            mirror=options.mirror,
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            device=measuring_device(),
        )
        print(table(result))
        if options.json:
            write_text(Path(options.json), json.dumps(result, indent=2) + "\n")
    except (DataError, DiskError, ModelError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()

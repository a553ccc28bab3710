"""A linear classifier on the frozen features of a model."""

from __future__ import annotations

from typing import Any, cast

import psutil
import torch
import torch.nn.functional as F

from gld_zoo.training.common.errors import DataError
from gld_zoo.training.data.batches import EvalBatches
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.measure.inputs import build_measured, measuring_batches

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
    measured = build_measured(name, device, image_size=image_size)
    check_features_fit(measured.model, len(source.train), mirror)

    def extract(rows: Rows, *, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        batches = measuring_batches(rows, measured, device, batch_size=batch_size, workers=workers)
        return pooled_features(measured.model, batches, mirrored=mirrored)

    parts = source.train.hold_out(HELD_OUT, seed)
    kept, held = (extract(rows, mirrored=mirror) for rows in parts)
    test = extract(source.test)
    return dict(
        model=name,
        dataset=source.name,
        train_images=len(kept[1]) + len(held[1]),
        test_images=len(test[1]),
        image_size=measured.size,
        features=kept[0].shape[-1],
        **fit_and_score(kept, held, test, len(source.label_names)),
    )


Features = tuple[torch.Tensor, torch.Tensor]  # `[N, V, D]` of V views of each image; classes `[N]`


def fit_and_score(kept: Features, held: Features, test: Features, classes: int) -> dict[str, float]:
    """Return the penalty that is best on images held out, and the top-1 in % of all with it."""
    penalty = choose_penalty(kept, (held[0][:, :1], held[1]), classes)
    features, target = (torch.cat(parts) for parts in zip(kept, held, strict=True))
    classifier = fit_classifier(features, target, classes, penalty)
    return dict(
        penalty=penalty,
        train_top1=top1_of(classifier, features[:, :1], target),
        top1=top1_of(classifier, *test),
    )


def choose_penalty(kept: Features, held: Features, classes: int) -> float:
    """Return the penalty whose classifier is best on images held out.

    Args:
        kept: Features `[N, V, D]` and classes `[N]` to fit to.
        held: Those held out, as they are and not mirrored: `[M, 1, D]` and `[M]`.
        classes: K.
    """
    return max(PENALTIES, key=lambda value: top1_of(fit_classifier(*kept, classes, value), *held))


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


def fit_classifier(
    features: torch.Tensor, target: torch.Tensor, classes: int, penalty: float
) -> Classifier:
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
def top1_of(classifier: Classifier, features: torch.Tensor, target: torch.Tensor) -> float:
    """Return the top-1 in % on features `[N, 1, D]`."""
    guess = classifier(classifier.standardize(features[:, 0])).argmax(1)
    return 100 * (guess == target).double().mean().item()

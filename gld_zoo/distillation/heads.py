"""Global and local logits of any timm model: its own head, on the whole map and on each cell."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, cast

import torch
import torch.nn as nn

from gld_zoo.distillation.maps import (
    FeatureMap,
    Grid,
    as_map,
    check_model,
    evaluating,
    feature_map,
)

# model -> the classifier its head was checked with; reset_classifier makes a new one, so it is
# checked again
_checked_heads: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref, ...]]
_checked_heads = weakref.WeakKeyDictionary()


class LocalLogits:
    """Give a timm model `forward_logits`."""

    def forward_logits(self, images: torch.Tensor, grid: Grid = 2) -> torch.Tensor:
        """Return global and local logits `[B, 1+L, K]`; see `global_local_logits`."""
        return global_local_logits(cast(nn.Module, self), images, grid)


class GlobalLocal(nn.Module):
    """Wrap a timm model so that its forward returns global and local logits `[B, 1+L, K]`.

    This is what a data-parallel trainer wraps: one `forward` that returns all the loss needs. The
    wrapper owns no parameter; `wrapped.model.state_dict()` is the model's own.

    Args:
        model: Any timm model that `global_local_logits` takes.
        grid: Cells along each side of the feature map, the paper's d, or several such numbers.

    Raises:
        ValueError: If the model is no classifier, or its head does not begin with average pooling;
            what else is wrong is told by `forward`, which sees the images.
    """

    def __init__(self, model: nn.Module, grid: Grid = 2) -> None:
        super().__init__()
        self.model = model
        self.grid = grid
        check_classifier(model)
        parameter = next(model.parameters())
        if not parameter.is_meta:
            values = parameter.new_empty(1, cast(Any, model).num_features, 2, 2)
            # here too, as a compiled forward does not check; heads that take no map at all, or
            # another form of it, fail
            with contextlib.suppress(RuntimeError, IndexError, AssertionError):
                check_head(model, FeatureMap(values, "NCHW"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `[B, C, H, W]` to logits `[B, 1+L, K]`."""
        return global_local_logits(self.model, images, self.grid)


class FeaturesAndLogits(nn.Module):
    """Wrap a timm model so that its forward returns global and local features, and its logits.

    What teaches by relations alone trains: the features of all rows, and where there are labels the
    logits of the whole image, of any head. The wrapper owns no parameter.

    Args:
        model: Any timm model that `global_local_features` takes.
        grid: Cells along each side of the feature map, or several such numbers.
    """

    def __init__(self, model: nn.Module, grid: Grid = 2) -> None:
        super().__init__()
        self.model = model
        self.grid = grid

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map images `[B, C, H, W]` to features `[B, 1+L, D]`, and logits `[B, K]` if it has any.

        Raises:
            ValueError: If the model has no map, or the grid does not fit it.
        """
        model: Any = self.model
        features = model.forward_features(images)
        found = as_map(model, features, images, self.grid)
        with torch.autocast(images.device.type, enabled=False):
            dtype = next(model.parameters()).dtype
            rows = found.to(dtype).rows(self.grid)
            return rows, model.forward_head(features.to(dtype)) if model.num_classes else None


def global_local_logits(model: nn.Module, images: torch.Tensor, grid: Grid = 2) -> torch.Tensor:
    """Classify the whole feature map and each of its grid² cells by the model's own head.

    Each average-pooled cell goes through `model.forward_head` as a map of one place, so that norms
    and 1 x 1 convolutions of the head count. Under autocast the head runs in float32: the relation
    term is a sum of differences of logits and does not survive bfloat16.

    Args:
        model: A timm model whose head begins with average pooling over its map, of any of the forms
            that `global_local_features` takes.
        images: Normalised images `[B, C, H, W]`.
        grid: Cells along each side, L = grid²; or several such numbers above 1, whose cells follow
            each other, L the sum of their squares. Where one does not divide the map, pooling is
            adaptive (some positions count in two cells).

    Returns:
        Logits `[B, 1+L, K]`: row 0 equals `model(images)`, then the cells row by row, top left
        first, grid by grid.

    Raises:
        ValueError: If the model has no such map, no such head or no classifier, or a grid is finer
            than the map or is not a number that there can be.

    Batch norm in a head, where a model has it, sees B(1+L) rows in training instead of B.

    Source: GLD (ICCV 2021), section 3, local logits.
    """
    check_classifier(model)
    found = feature_map(model, images, grid)
    if not torch.compiler.is_compiling():
        check_head(model, found)
    with torch.autocast(images.device.type, enabled=False):
        # what autocast left in bfloat16 goes back to the classifier's own type
        rows = found.to(head_dtype(model)).rows(grid)
        return classify_rows(model, rows, found)


def classify_rows(model: Any, rows: torch.Tensor, like: FeatureMap) -> torch.Tensor:
    """Map features of cells `[B, R, D]` to logits `[B, R, K]` by the model's own head.

    Args:
        model: Whose features they are.
        rows: In the type of its classifier.
        like: A map of its, whose form the head takes.
    """
    logits = model.forward_head(like.of_one_place(rows.flatten(0, 1)))
    return logits.unflatten(0, rows.shape[:2])


def classifiers(model: Any) -> tuple[nn.Module, ...]:
    """Return a timm model's classifier, or both of one that has a second for distillation."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def head_dtype(model: Any) -> torch.dtype:
    """Return the type of a model's classifier."""
    weights = (weight for part in classifiers(model) for weight in part.parameters())
    return next(weights, next(model.parameters())).dtype


def check_classifier(model: Any) -> None:
    """Refuse a model without a classifier, and what is no timm model.

    Raises:
        ValueError: If it has none.
    """
    check_model(model)
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"{type(model).__name__} has no classifier "
            f"(num_classes={getattr(model, 'num_classes', None)}), so it has no local logits; "
            "create it with num_classes=K or call reset_classifier(K)"
        )


@torch.no_grad()
def check_head(model: Any, found: FeatureMap) -> None:
    """Refuse, once a classifier, a head that does not begin with average pooling over the map.

    Raises:
        ValueError: If it does not.
    """
    parts = classifiers(model)
    checked = _checked_heads.get(model, ())
    if len(checked) == len(parts) and all(
        ref() is part for ref, part in zip(checked, parts, strict=True)
    ):
        return
    noise = _noise_like(found, head_dtype(model))
    values = noise.values
    with evaluating(model):
        whole = model.forward_head(_in_form(noise, values)).float()
        pooled = model.forward_head(noise.of_one_place(values.mean((2, 3)))).float()
        other = model.forward_head(_in_form(noise, values.flip(1))).float()
    response = (other - whole).abs().max()  # what the channels decide, without the bias
    # rounding stays far below; a layer before the pooling is off by 3% and more, another pooling by
    # the response
    tolerance = 0.01 if values.dtype.itemsize >= 4 else 0.1
    if whole.shape != pooled.shape or (whole - pooled).abs().max() > tolerance * response:
        raise ValueError(_why_no_logits(type(model).__name__, found))
    if response > 0:  # a head of zeros shows nothing yet
        _checked_heads[model] = tuple(weakref.ref(part) for part in parts)


def _why_no_logits(name: str, found: FeatureMap) -> str:
    if found.form == "tokens" and found.prefix:
        reason = "classifies its class token, or another of those that belong to no place"
    else:
        reason = "gives other logits for a feature map than for the map's mean"
    return (
        f"the head of {name} does not begin with average pooling: it {reason}, so local logits are "
        "undefined; use a model with global_pool='avg' and no spatial layer in its head, or fit a "
        "linear head on its global_local_features (teacher_head: fit)"
    )


def _noise_like(found: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    """Return a positive random map of at least 2 x 2, where poolings and channels differ.

    Its values are large, so that attention that begins almost even does not pass for an average.
    """
    channels, *size = found.values.shape[1:]
    height, width = (max(2, side) for side in size)
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    noise = 100 * torch.rand((1, channels, height, width), generator=generator)
    noise *= torch.rand((1, channels, 1, 1), generator=generator)
    return FeatureMap(noise.to(found.values.device, dtype), found.form, found.prefix)


def _in_form(like: FeatureMap, values: torch.Tensor) -> torch.Tensor:
    """Return a map `[1, D, H, W]` in the form of another, its prefix tokens unlike any place."""
    if like.form == "NCHW":
        return values
    if like.form == "NHWC":
        return values.permute(0, 2, 3, 1)
    places = values.flatten(2).transpose(1, 2)
    prefix = values.amax((2, 3))[:, None].flip(2).expand(-1, like.prefix, -1)
    return torch.cat([prefix, places], dim=1)

"""Global and local logits of any timm CNN: its own head, on the whole map and on each cell."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

Grid = int | Sequence[int]

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
    """Wrap a timm CNN so that its forward returns global and local logits `[B, 1+L, K]`.

    This is what a data-parallel trainer wraps: one `forward` that returns all the loss needs. The
    wrapper owns no parameter; `wrapped.model.state_dict()` is the model's own.

    Args:
        model: Any timm CNN that `global_local_logits` takes.
        grid: Cells along each side of the feature map, the paper's d, or several such numbers.

    Raises:
        ValueError: If the model is no classifier, or its head does not begin with average pooling;
            what else is wrong is told by `forward`, which sees the images.
    """

    def __init__(self, model: nn.Module, grid: Grid = 2) -> None:
        super().__init__()
        self.model = model
        self.grid = grid
        _check_model(model)
        parameter = next(model.parameters())
        if not parameter.is_meta:
            map_like = parameter.new_empty(1, cast(Any, model).num_features, 2, 2)
            # here too, as a compiled forward does not check; heads that take no map at all fail
            with contextlib.suppress(RuntimeError, IndexError, AssertionError):
                _check_head(model, map_like)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `[B, C, H, W]` to logits `[B, 1+L, K]`."""
        return global_local_logits(self.model, images, self.grid)


def global_local_logits(model: nn.Module, images: torch.Tensor, grid: Grid = 2) -> torch.Tensor:
    """Classify the whole feature map and each of its grid² cells by the model's own head.

    Each average-pooled cell goes through `model.forward_head` as a 1 x 1 map, so that norms and 1 x
    1 convolutions of the head count. Under autocast the head runs in float32: the relation term is
    a sum of differences of logits and does not survive bfloat16.

    Args:
        model: A timm CNN with a `[B, D, H, W]` feature map and a head that begins with average
            pooling.
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
    _check_model(model)
    features = cast(Any, model).forward_features(images)
    _check_map(model, features, images, grid)
    if not torch.compiler.is_compiling():
        _check_head(model, features)
    with torch.autocast(features.device.type, enabled=False):
        # what autocast left in bfloat16 goes back to the classifier's own type
        return _head_rows(model, features.to(_head_dtype(model)), grid)


def classifiers(model: Any) -> tuple[nn.Module, ...]:
    """Return a timm model's classifier, or both of one that has a second for distillation."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _head_dtype(model: Any) -> torch.dtype:
    weights = (weight for part in classifiers(model) for weight in part.parameters())
    return next(weights, next(model.parameters())).dtype


def grids_of(grid: Grid) -> tuple[int, ...]:
    """Return the numbers of cells along a side, one or several.

    Raises:
        ValueError: If one is no whole number, or of several one is not above 1 or comes twice.
    """
    if isinstance(grid, int) and not isinstance(grid, bool):
        return (grid,)
    grids = tuple(grid) if isinstance(grid, Sequence) else ()
    kinds = {type(side) for side in grids}
    if kinds != {int} or min(grids) < 2 or len(set(grids)) < len(grids):
        raise ValueError(
            f"grid={grid!r} must be a whole number, or different ones above 1 such as (2, 4)"
        )
    return grids


def count_cells(grid: Grid) -> int:
    """Return L, the cells of all grids."""
    return sum(side * side for side in grids_of(grid))


def _head_rows(model: Any, features: torch.Tensor, grid: Grid) -> torch.Tensor:
    pooled = [features.mean((2, 3)).unsqueeze(2)]
    pooled += [_cells(features, side) for side in grids_of(grid)]
    rows = torch.cat(pooled, dim=2).transpose(1, 2)  # [B, 1+L, D]
    logits = model.forward_head(rows.flatten(0, 1)[:, :, None, None])
    return logits.unflatten(0, rows.shape[:2])


def _cells(features: torch.Tensor, grid: int) -> torch.Tensor:
    """Return the means `[B, D, grid²]` of a map's cells."""
    height, width = features.shape[2:]
    # adaptive_avg_pool2d, with a gradient that repeats to the bit on a GPU
    if height % grid or width % grid:
        rows, columns = (_pooling(side, grid, features) for side in (height, width))
        return (rows @ features @ columns.T).flatten(2)
    return F.avg_pool2d(features, (height // grid, width // grid)).flatten(2)


def _pooling(side: int, grid: int, like: torch.Tensor) -> torch.Tensor:
    """Return the matrix `[grid, side]` that averages a map's rows as adaptive pooling does."""
    cell = torch.arange(grid, device=like.device)[:, None]
    place = torch.arange(side, device=like.device)
    first, end = cell * side // grid, ((cell + 1) * side + grid - 1) // grid
    inside = ((first <= place) & (place < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ValueError(
            f"{name} has no forward_features and forward_head; local logits need a whole timm "
            "classifier, not a features_only or wrapped model"
        )
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"{name} has no classifier (num_classes={getattr(model, 'num_classes', None)}), so it "
            "has no local logits; create it with num_classes=K or call reset_classifier(K)"
        )


def _check_map(model: Any, features: torch.Tensor, images: torch.Tensor, grid: Grid) -> None:
    name = type(model).__name__
    kind = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
    if not isinstance(kind, list) or len(kind) != 4 or kind[1] != model.num_features:
        raise ValueError(
            f"{name}.forward_features gives {kind} for images "
            f"{list(images.shape)}; local logits need a map [B, {model.num_features}, H, W], "
            "as convolutional networks have"
        )
    height, width = features.shape[2:]
    grids = grids_of(grid)
    finest = max(grids)
    if min(grids) < 1 or finest > min(height, width):
        raise ValueError(
            f"grid={grid} needs a feature map of at least {finest}x{finest}, got {height}x{width} "
            f"for a {images.shape[2]}x{images.shape[3]} input; use a larger input "
            f"or a grid from 1 to {min(height, width)}"
        )


@torch.no_grad()
def _check_head(model: Any, features: torch.Tensor) -> None:
    """Refuse, once a classifier, a head that does not begin with average pooling."""
    parts = classifiers(model)
    checked = _checked_heads.get(model, ())
    if len(checked) == len(parts) and all(
        ref() is part for ref, part in zip(checked, parts, strict=True)
    ):
        return
    noise = _noise_like(features, _head_dtype(model))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(features.device.type, enabled=False):
            whole = model.forward_head(noise).float()
            pooled = model.forward_head(noise.mean((2, 3), keepdim=True)).float()
            other = model.forward_head(noise.flip(1)).float()
    finally:
        for module in training:
            module.training = True
    response = (other - whole).abs().max()  # what the channels decide, without the bias
    # rounding stays far below; a layer before the pooling is off by 3% and more, another pooling by
    # the response
    tolerance = 0.01 if noise.dtype.itemsize >= 4 else 0.1
    if whole.shape != pooled.shape or (whole - pooled).abs().max() > tolerance * response:
        raise ValueError(
            f"the head of {type(model).__name__} does not begin with average pooling: it gives "
            "other logits for a feature map than for the map's mean, so local logits are "
            "undefined; use a model with global_pool='avg' and no spatial layer in its head"
        )
    if response > 0:  # a head of zeros shows nothing yet
        _checked_heads[model] = tuple(weakref.ref(part) for part in parts)


def _noise_like(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a positive random map of at least 2 x 2, where poolings and channels differ."""
    height, width = (max(2, side) for side in features.shape[2:])
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    noise = torch.rand((1, features.shape[1], height, width), generator=generator)
    noise *= torch.rand((1, features.shape[1], 1, 1), generator=generator)
    return noise.to(features.device, dtype)

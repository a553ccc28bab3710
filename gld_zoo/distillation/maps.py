"""The feature map of any timm model, and its averages over the whole and over each cell.

Maps come in three forms, told apart by where their D channels stand: `[B, D, H, W]` of CNNs,
`[B, H, W, D]` of Swin and its kind, and tokens `[B, P+HW, D]` of vision transformers, the
first P of which are class and register tokens that belong to no place.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

Grid = int | Sequence[int]
Form = Literal["NCHW", "NHWC", "tokens"]

# models whose tokens have been found to lie line by line
_checked_tokens: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class FeatureMap:
    """What a model's `forward_head` takes, seen as a map.

    `values` are `[B, D, H, W]` whatever the form, without the `prefix` tokens that come first.
    """

    values: torch.Tensor
    form: Form
    prefix: int = 0

    def rows(self, grid: Grid) -> torch.Tensor:
        """Return the means `[B, 1+L, D]` of the whole map, and of its cells grid by grid."""
        pooled = [self.values.mean((2, 3)).unsqueeze(2)]
        pooled += [_cells(self.values, side) for side in grids_of(grid)]
        return torch.cat(pooled, dim=2).transpose(1, 2)

    def of_one_place(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows `[n, D]` as maps of one place in the model's own form, the prefix zeros."""
        if self.form == "NCHW":
            return rows[:, :, None, None]
        if self.form == "NHWC":
            return rows[:, None, None, :]
        return F.pad(rows[:, None], (0, 0, self.prefix, 0))

    def described(self) -> FeatureMap:
        """Return a map of the same form and size without its values."""
        return FeatureMap(torch.empty(self.values.shape, device="meta"), self.form, self.prefix)

    def to(self, dtype: torch.dtype) -> FeatureMap:
        """Return the map in another type."""
        return FeatureMap(self.values.to(dtype), self.form, self.prefix)


def global_local_features(model: nn.Module, images: torch.Tensor, grid: Grid = 2) -> torch.Tensor:
    """Average the map that a model's head takes, over the whole and over each of its grid² cells.

    Args:
        model: Any timm model that has a map, a classifier or not. Class and register tokens are
            left out.
        images: Normalised images `[B, C, H, W]`.
        grid: Cells along each side, L = grid²; or several such numbers above 1, whose cells follow
            each other, L the sum of their squares. Where one does not divide the map, pooling is
            adaptive (some positions count in two cells).

    Returns:
        Features `[B, 1+L, D]`: row 0 of the whole map, then the cells row by row, top left first,
        grid by grid; in the type of the model's weights, under autocast too.

    Raises:
        ValueError: If the model has no such map, or a grid is finer than the map or is not a number
            that there can be.

    Source: GLD (ICCV 2021), section 3, for the cells; that they are features is ours.
    """
    found = feature_map(model, images, grid)
    with torch.autocast(images.device.type, enabled=False):
        # what autocast left in bfloat16 is averaged in the weights' own type
        return found.to(next(model.parameters()).dtype).rows(grid)


def feature_map(model: nn.Module, images: torch.Tensor, grid: Grid = 1) -> FeatureMap:
    """Return the map that a model's head takes, as it is computed.

    Args:
        model: Any timm model that has one.
        images: Normalised images `[B, C, H, W]`.
        grid: What it is to be divided by.

    Raises:
        ValueError: If the model has no map, or a grid does not fit it.
    """
    check_model(model)
    return as_map(model, model.forward_features(images), images, grid)  # type: ignore[operator]


def as_map(model: nn.Module, features: Any, images: torch.Tensor, grid: Grid = 1) -> FeatureMap:
    """Return what a model's `forward_features` gave for images as a map; see `feature_map`."""
    found = _fold(model, features, images)
    if found.form == "tokens" and not torch.compiler.is_compiling():
        _check_tokens(model, images)
    check_grid(grid, found.values.shape[2:], images)
    return found


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


def check_grid(grid: Grid, size: Sequence[int], images: torch.Tensor) -> None:
    """Refuse a grid that is finer than a map of height and width `size`.

    Raises:
        ValueError: If it is.
    """
    height, width = size
    grids = grids_of(grid)
    finest = max(grids)
    if min(grids) < 1 or finest > min(height, width):
        raise ValueError(
            f"grid={grid} needs a feature map of at least {finest}x{finest}, got {height}x{width} "
            f"for a {images.shape[2]}x{images.shape[3]} input; use a larger input "
            f"or a grid from 1 to {min(height, width)}"
        )


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


def check_model(model: Any) -> None:
    """Refuse what has no `forward_features` and `forward_head`.

    Raises:
        ValueError: If it has not.
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ValueError(
            f"{type(model).__name__} has no forward_features and forward_head; cells need a whole "
            "timm model, not a features_only or wrapped one"
        )


def _fold(model: Any, features: Any, images: torch.Tensor) -> FeatureMap:
    """Return what `forward_features` gave as a map."""
    width = model.num_features
    shape = list(features.shape) if isinstance(features, torch.Tensor) else []
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    if len(shape) == 4 and shape[1] == width and not channels_last:
        return FeatureMap(features, "NCHW")
    if len(shape) == 4 and shape[3] == width:
        return FeatureMap(features.permute(0, 3, 1, 2), "NHWC")
    if len(shape) == 3 and shape[2] == width:
        prefix, height = _fold_tokens(model, shape[1], images)
        if height:
            places = features[:, prefix:].transpose(1, 2)
            return FeatureMap(places.unflatten(2, (height, -1)), "tokens", prefix)
    raise ValueError(
        f"{type(model).__name__}.forward_features gives {shape or type(features).__name__} for "
        f"images {list(images.shape)}; cells need a map [B, {width}, H, W] or [B, H, W, {width}], "
        f"or its places as tokens [B, N, {width}]"
    )


def _fold_tokens(model: Any, count: int, images: torch.Tensor) -> tuple[int, int]:
    """Return how many tokens come before those of the map, and its height; 0 if it is none.

    A model that does not tell the first has the largest map of the images' aspect.
    """
    height, width = images.shape[2:]
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        common = math.gcd(height, width)
        unit = (height // common) * (width // common)
        times = math.isqrt(count // unit)
        return count - unit * times**2, height // common * times
    lines = round(math.sqrt(max(0, count - prefix) * height / width))
    return prefix, 0 if not lines or (count - prefix) % lines else lines


@torch.no_grad()
def _check_tokens(model: Any, images: torch.Tensor) -> None:
    """Refuse, once a model, tokens of which it is not known that they lie line by line.

    `forward_intermediates` tells their places, of which the last must hold what the head gets.
    """
    if model in _checked_tokens or images.device.type == "meta":
        return
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    noise = torch.randn((1, *images.shape[1:]), generator=generator).to(parameter)
    with evaluating(model):
        found = _fold(model, model.forward_features(noise), noise).values.float()
        known = [
            places.shape == found.shape
            and (places.float() - found).abs().max() <= 1e-2 * found.abs().max()
            for places in _last_places(model, noise)
        ]
    if not (any(known) or (not known and hasattr(model, "num_prefix_tokens"))):
        raise ValueError(
            f"the tokens of {type(model).__name__} are not those of a map line by line, as far as "
            "its forward_intermediates tells; cells need their places"
        )
    _checked_tokens.add(model)


def _last_places(model: Any, images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the last maps `[B, D, H, W]` that a model tells, with its last norm and without."""
    for norm in (True, False):
        # some have no such method, some no norm or no such form
        with contextlib.suppress(AssertionError, AttributeError, NotImplementedError, TypeError):
            yield model.forward_intermediates(
                images, indices=1, norm=norm, output_fmt="NCHW", intermediates_only=True
            )[-1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and without autocast; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True

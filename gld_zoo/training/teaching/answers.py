"""What is kept of a teacher's rows: the smaller of features and logits, without what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from gld_zoo.distillation.maps import Grid, grids_of
from gld_zoo.training.common.errors import StoreError

DTYPES = dict(float16=torch.float16, float32=torch.float32)


@dataclass(frozen=True)
class Answers:
    """How the rows `[B, 1+L, W]` of a teacher are kept.

    In float16 the global row is left out where it is the mean of one grid's cells, those from
    `first` up to `end`, counted without it. In float32 all rows are kept, so that they are to the
    bit what the teacher answered.

    Args:
        what: Which of its rows.
        cells: L.
        width: W.
        dtype: Type of the numbers, 'float16' or 'float32'.
        first, end: Of the cells that make the global row; equal where they do not.
    """

    what: Literal["features", "logits"]
    cells: int
    width: int
    dtype: str
    first: int = 0
    end: int = 0

    @property
    def leaves_global_out(self) -> bool:
        """Whether the global row is not kept."""
        return self.end > self.first

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and numbers in each that are kept of an image."""
        return self.cells + (not self.leaves_global_out), self.width

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what is kept of rows `[B, 1+L, W]`, a copy.

        Raises:
            StoreError: If a number does not fit the type.
        """
        kept = rows[:, 1:] if self.leaves_global_out else rows
        encoded = kept.to(DTYPES[self.dtype], copy=True)
        if self.dtype == "float16" and not encoded.isfinite().all():
            raise StoreError(
                f"the teacher's {self.what} reach {kept.abs().max():.3g}, which float16 does not "
                "hold; use store_dtype: float32"
            )
        return encoded

    def decode(self, kept: torch.Tensor) -> torch.Tensor:
        """Return rows `[B, 1+L, W]` in float32 of what is kept."""
        rows = kept.float()
        if not self.leaves_global_out:
            return rows
        return torch.cat([rows[:, self.first : self.end].mean(1, keepdim=True), rows], dim=1)


def choose_answers(teacher: Any, grid: Grid, classes: int, dtype: str) -> Answers:
    """Return how to keep a teacher's rows.

    Args:
        teacher: A `Teacher` that has been shown images.
        grid: Its grid.
        classes: K.
        dtype: Type of the numbers.
    """
    width, *size = teacher.layout.values.shape[1:]
    features = teacher.kind == "none" or width <= classes
    grids, first = grids_of(grid), 0
    span = (0, 0)
    if dtype == "float16" and (features or teacher.head_is_affine()):
        for side in grids:
            if not any(length % side for length in size):
                span = (first, first + side * side)
                break
            first += side * side
    return Answers(
        what="features" if features else "logits",
        cells=sum(side * side for side in grids),
        width=width if features else classes,
        dtype=dtype,
        first=span[0],
        end=span[1],
    )

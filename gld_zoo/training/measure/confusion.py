"""The picture of which class a model takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure


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

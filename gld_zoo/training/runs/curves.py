"""The picture of a run: its score, loss terms and learning rate by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def measured_split(history: list[dict[str, Any]]) -> str:
    """Return which split lines of metrics were measured on: the one held out, if any."""
    return "val" if any(name.startswith("val_") for line in history for name in line) else "test"


def draw_curves(history: list[dict[str, Any]], path: Path, metric: str, title: str) -> None:
    """Draw a score in %, loss terms and learning rate by epoch.

    Args:
        history: A line of metrics an epoch.
        path: PNG to write.
        metric: Name of the score in the lines, after its split's.
        title: What people call it.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    # a layout that is computed takes half of the drawing's time
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.14, top=0.91, wspace=0.2)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    _draw_score(axes[0], history, metric, title)
    _draw_loss(axes[1], history)
    _draw_rate(axes[2], history)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _draw_score(ax: Any, history: list[dict[str, Any]], metric: str, title: str) -> None:
    for name in ("train", measured_split(history)):
        measured = [line for line in history if f"{name}_{metric}" in line]
        if measured:
            values = [line[f"{name}_{metric}"] for line in measured]
            ax.plot([line["epoch"] for line in measured], values, marker=".", label=name)
            ax.set(title=f"{title}, {name} {values[-1]:.2f} %", ylabel="%")
    if ax.lines:
        ax.legend()


def _draw_loss(ax: Any, history: list[dict[str, Any]]) -> None:
    epochs = [line["epoch"] for line in history]
    terms = [key for key in history[-1] if key.startswith("loss")]
    for key in terms if len(terms) > 2 else ["loss"]:
        style: dict[str, Any] = dict(color="black", linewidth=2) if key == "loss" else {}
        label = "sum" if key == "loss" else key.removeprefix("loss_")
        ax.plot(epochs, [line[key] for line in history], label=label, **style)
    ax.set(title="training loss and its weighted terms", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if len(terms) > 2:
        ax.margins(y=0.25)  # for the legend
        style = dict(fontsize="small", columnspacing=1, handlelength=1.4)
        ax.legend(ncols=len(terms), loc="upper center", **style)


def _draw_rate(ax: Any, history: list[dict[str, Any]]) -> None:
    epochs = [line["epoch"] for line in history]
    edges = [0.5, *(epoch + 0.5 for epoch in epochs)]
    ax.stairs([line["lr"] for line in history], edges, baseline=None, color="gray")
    ax.set(title="learning rate", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlim(left=min(epochs) - 0.5)

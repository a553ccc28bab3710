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


def draw_curves(history: list[dict[str, Any]], path: Path, score: str, title: str) -> None:
    """Draw a score in %, loss terms and learning rate by epoch.

    Args:
        history: A line of metrics an epoch.
        path: PNG to write.
        score: Name of the score in the lines, after its split's.
        title: What people call it.
    """
    epochs = [line["epoch"] for line in history]
    last = history[-1]
    split = measured_split(history)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    # a layout that is computed takes half of the drawing's time
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.14, top=0.91, wspace=0.2)
    for name in ("train", split):
        measured = [line for line in history if f"{name}_{score}" in line]
        if measured:
            values = [line[f"{name}_{score}"] for line in measured]
            axes[0].plot([line["epoch"] for line in measured], values, marker=".", label=name)
            axes[0].set(title=f"{title}, {name} {values[-1]:.2f} %", ylabel="%")
    terms = [key for key in last if key.startswith("loss")]
    for key in terms if len(terms) > 2 else ["loss"]:
        style = dict(color="black", linewidth=2) if key == "loss" else {}
        label = "sum" if key == "loss" else key.removeprefix("loss_")
        axes[1].plot(epochs, [line[key] for line in history], label=label, **style)
    axes[1].set(title="training loss and its weighted terms", yscale="log")
    rates = [line["lr"] for line in history]
    axes[2].stairs(rates, [0.5, *(epoch + 0.5 for epoch in epochs)], baseline=None, color="gray")
    axes[2].set(title="learning rate", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[1:]:
        ax.yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[2].set_xlim(left=min(epochs) - 0.5)
    if axes[0].lines:
        axes[0].legend()
    if len(terms) > 2:
        axes[1].margins(y=0.25)  # for the legend
        axes[1].legend(
            ncols=len(terms),
            loc="upper center",
            fontsize="small",
            columnspacing=1,
            handlelength=1.4,
        )
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)

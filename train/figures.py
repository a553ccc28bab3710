"""Draw figures of our own runs: those of the paper's supplementary material, and curves.

    python train/figures.py activations --models '{global: RUN, local: RUN}' --out FILE.png
    python train/figures.py concentration --models '{global: RUN, local: RUN}' --dataset DIR
    python train/figures.py local_predictions --models '{alone: MODEL, GLD: MODEL}' --out FILE.png
    python train/figures.py components --out FILE.png
    python train/figures.py zoo --out FILE.png
    python train/figures.py curves --runs '{pretrained: RUN, random: RUN}' --metrics '[test_miou]' \
        --out FILE.png

A model is a timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder. Images are of the bundled
test split unless another dataset is named; `components` and `zoo` read gld_zoo/results.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jsonargparse import auto_cli
from timm.data import resolve_model_data_config

from gld_zoo import global_local_logits
from gld_zoo.model_card import is_cifar100
from gld_zoo.results import PATH, Results, Row
from gld_zoo.training.build.create import create_frozen
from gld_zoo.training.common.errors import DataError, ModelError
from gld_zoo.training.data.batches import Normalize, Transforms
from gld_zoo.training.data.memory import Split, decode
from gld_zoo.training.data.sources import ImageSource

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BUNDLED = "gld_zoo/data/cifar100_mini"
CPU = torch.device("cpu")
COMPONENTS = ("alone", "global", "local", "relation", "gld")
PUBLIC = Path(__file__).parent.parent / "figures" / "public_zoos.json"
WHOLE = 10_000  # test images of CIFAR-100
MARKERS = "sDv^"  # of the public zoos, in their file's order


def activations(
    models: dict[str, str], out: Path, dataset: str = BUNDLED, rows: list[int] | None = None
) -> None:
    """Draw the largest activation over channels at each position of the last feature map.

    Each map has its own scale, from its smallest value to its largest.

    Args:
        models: Column title and model.
        out: PNG to write.
        dataset: Hub id or folder of the images.
        rows: Of its test split; null takes the first six.
    """
    source, split = _images(dataset, rows or list(range(6)))
    figure, axes = _grid(len(split.labels), 1 + len(models))
    for row, label in enumerate(split.labels.tolist()):
        _show_image(axes[row, 0], split.images[row], source.label_names[label])
    for column, (title, name) in enumerate(models.items(), start=1):
        model, inputs = _model_and_inputs(name, split)
        with torch.no_grad():
            maps = model.forward_features(inputs).amax(1)
        axes[0, column].set_title(title, fontsize=9)
        for row in range(len(maps)):
            axes[row, column].imshow(maps[row], cmap="viridis")
    _save(figure, out)


@torch.no_grad()
def concentration(
    models: dict[str, str], dataset: str = BUNDLED, images: int | None = None
) -> None:
    """Print how wide the maps of `activations` are: the share of a map above half its maximum.

    Args:
        models: Label and model.
        dataset: Hub id or folder of the images.
        images: How many of its test split to average over, from the first on; null takes all.
    """
    _, split = _images(dataset, None if images is None else list(range(images)))
    for label, name in models.items():
        model, inputs = _model_and_inputs(name, split)
        maps = torch.cat([model.forward_features(part).amax(1) for part in inputs.split(250)])
        wide = (maps > maps.amax((1, 2), keepdim=True) / 2).double().mean()
        print(f"{label}: {wide:.1%} of {maps[0].numel()} positions, mean of {len(maps)} images")


def local_predictions(
    models: dict[str, str],
    out: Path,
    dataset: str = BUNDLED,
    rows: list[int] | None = None,
    grid: int = 2,
) -> None:
    """Write on each cell of an image the class that its local logits give, and its probability.

    Green is the right class; the title is the class and probability of the global logits.

    Args:
        models: Column title and model.
        out: PNG to write.
        dataset: Hub id or folder of the images.
        rows: Of its test split; null takes the first six.
        grid: Cells along each side.
    """
    source, split = _images(dataset, rows or list(range(6)))
    figure, axes = _grid(len(split.labels), 1 + len(models), scale=2.2)
    for row, label in enumerate(split.labels.tolist()):
        _show_image(axes[row, 0], split.images[row], source.label_names[label])
    for column, (title, name) in enumerate(models.items(), start=1):
        model, inputs = _model_and_inputs(name, split, source.label_names)
        with torch.no_grad():
            probabilities = global_local_logits(model, inputs, grid).softmax(-1)
        for row, label in enumerate(split.labels.tolist()):
            ax, side = axes[row, column], split.images.shape[1] / grid
            ax.imshow(split.images[row], alpha=0.45)
            best = probabilities[row].max(-1)
            for cell, (share, guess) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ):
                text = f"{source.label_names[guess].replace('_', ' ')}\n{share:.0%}"
                color = "darkgreen" if guess == label else "darkred"
                if cell == 0:
                    head = f"{title}: " if row == 0 else ""
                    ax.set_title(head + text.replace("\n", " "), color=color, fontsize=7)
                    continue
                y, x = divmod(cell - 1, grid)
                place = ((x + 0.5) * side - 0.5, (y + 0.5) * side - 0.5)
                ax.text(*place, text, color=color, fontsize=6, ha="center", va="center")
            for line in range(1, grid):
                ax.axhline(line * side - 0.5, color="white", linewidth=1)
                ax.axvline(line * side - 0.5, color="white", linewidth=1)
    _save(figure, out)


def components(out: Path) -> None:
    """Draw the top-1 of each component of the loss alone and of all together, with seeds' spread.

    Args:
        out: PNG to write.
    """
    results = Results.load()
    rows = {
        setup: [results.rows[row[f"method_{part}"]["weights"]] for part in COMPONENTS]
        for setup, row in results.setups.items()
        if all(f"method_{part}" in row for part in COMPONENTS)
    }
    if not rows:
        sys.exit(
            f"error: no setup in {PATH} has all of method_{', method_'.join(COMPONENTS)}; "
            "record their runs by train/release.py"
        )
    figure, axes = plt.subplots(
        1, len(rows), figsize=(4.2 * len(rows), 3.4), layout="constrained", squeeze=False
    )
    for ax, (setup, entries) in zip(axes[0], rows.items(), strict=True):
        seeds = [[run.top1 for run in entry.runs] for entry in entries]
        means = [statistics.mean(values) for values in seeds]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
        bars = ax.bar(COMPONENTS, means, yerr=spreads if any(spreads) else None, color="steelblue")
        ax.bar_label(bars, fmt="%.2f", fontsize=8)
        ax.set_ylim(min(means) - 2, max(means) + 1)
        row = results.setups[setup]
        pair = f"{row['teacher']['model']} → {row['gld']['model']}"
        epochs, count = entries[0].epochs, len(seeds[0])
        ax.set_title(f"({setup}) {pair}\n{epochs} epochs, {count} seed{'s' * (count > 1)}")
        ax.set_ylabel("top-1, %")
    _save(figure, out)


def zoo(out: Path, public: Path = PUBLIC) -> None:
    """Draw top-1 on CIFAR-100 against parameters: our best runs, and public zoos' numbers.

    Args:
        out: PNG to write.
        public: JSON of the others: of each zoo its name and, by model, millions of parameters and
            top-1 in %.
    """
    figure, ax = plt.subplots(figsize=(8.6, 3.2), layout="constrained")
    others = json.loads(public.read_text(encoding="utf-8"))
    for other, marker in zip(others, MARKERS, strict=True):
        parameters, scores = zip(*other["models"].values(), strict=True)
        epochs = other["epochs"] or "untold number of"
        label = f"{other['zoo']}, {epochs} epochs, labels alone"
        ax.scatter(parameters, scores, s=18, marker=marker, color="0.6", label=label)
    for label, colour, distilled in (
        ("gld_zoo, labels alone", "tab:blue", False),
        ("gld_zoo, distilled", "tab:red", True),
    ):
        best = _best_runs(distilled)
        places = [(row.parameters / 1e6, row.mean_top1()) for row in best.values()]
        lengths = sorted(_epochs_in_all(row) for row in best.values())
        label += f", {lengths[0]} to {lengths[-1]} epochs" if lengths else ""
        ax.scatter(*zip(*places, strict=True), s=30, color=colour, label=label, zorder=3)
        for name, (x, y) in zip(best, places, strict=True):
            ax.annotate(
                name.removeprefix("gld_"),
                (x, y),
                (0, 6 if distilled else -12),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                color=colour,
            )
    ax.margins(y=0.1)  # for the names
    ax.set_xscale("log")
    ax.set_xticks(
        [0.2, 0.5, 1, 2, 5, 10, 20], labels=["0.2", "0.5", "1", "2", "5", "10", "20"], minor=False
    )
    ax.set(xlabel="parameters, millions", ylabel="CIFAR-100 top-1, %", xlim=(0.14, 28))
    ax.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    _save(figure, out)


def _epochs_in_all(row: Row) -> int:
    """Return a row's epochs with those of the weights that it began with."""
    start = Results.load().rows.get(str(row.changes.get("student")))
    return (row.epochs or 0) + (_epochs_in_all(start) if start else 0)


def _best_runs(distilled: bool) -> dict[str, Row]:
    """Return of each of our architectures the run on CIFAR-100 that scores best, by kind."""
    best: dict[str, Row] = {}
    for name, row in Results.load().rows.items():
        architecture = name.partition(".")[0]
        whole = is_cifar100(row) and row.test_images == WHOLE  # and not the bundled images alone
        if not whole or not architecture.startswith("gld_"):
            continue
        held = best.get(architecture)
        if (row.teacher is not None) is distilled and (
            held is None or row.mean_top1() > held.mean_top1()
        ):
            best[architecture] = row
    return best


def curves(runs: dict[str, Path], metrics: list[str], out: Path) -> None:
    """Draw what runs measured epoch by epoch: a panel for each metric, in it a line for each run.

    Args:
        runs: Label and run folder.
        metrics: Names in their metrics.jsonl, such as test_loss and test_top1.
        out: PNG to write.
    """
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.2), layout="constrained", squeeze=False
    )
    for label, folder in runs.items():
        lines = _history(folder)
        for ax, metric in zip(axes[0], metrics, strict=True):
            measured = [line for line in lines if metric in line]
            if not measured:
                names = ", ".join(dict.fromkeys(name for line in lines for name in line))
                sys.exit(f"error: {folder} has no {metric!r}; it has {names}")
            values = [line[metric] for line in measured]
            epochs = [line["epoch"] for line in measured]
            ax.plot(epochs, values, marker=".", label=f"{label}: {values[-1]:.2f}")
    for ax, metric in zip(axes[0], metrics, strict=True):
        ax.set(title=metric, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    _save(figure, out)


def _history(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: {folder} holds no run with an epoch done: {error.strerror}")
    return [json.loads(line) for line in text.splitlines()]


def _images(dataset: str, rows: list[int] | None) -> tuple[ImageSource, Split]:
    """Return a dataset, and rows of its test split in the order given; None takes all."""
    source = ImageSource(dataset)
    test, count = source.test, len(source.test)
    if rows is not None:
        if wrong := [row for row in rows if not 0 <= row < count]:
            sys.exit(f"error: {test.where} has rows 0 to {count - 1}, not {wrong[0]}")
        test = test.select(torch.tensor(rows))
    size = test.read(test.table[0][test.image_column], test.place(0)).width
    return source, decode(test, Transforms(size).fit(), size)


def _model_and_inputs(
    name: str, split: Split, label_names: list[str] | None = None
) -> tuple[Any, torch.Tensor]:
    """Return a model, of those classes if they are given, and the images as it takes them."""
    model = create_frozen(name, CPU, label_names=label_names)
    config = resolve_model_data_config(model)
    inputs = Normalize(config["mean"], config["std"], CPU)(split.images)
    size = config["input_size"][-1]
    if size != inputs.shape[-1]:
        inputs = torch.nn.functional.interpolate(inputs, size=size, mode="bilinear", antialias=True)
    return model, inputs


def _grid(rows: int, columns: int, scale: float = 1.3) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(scale * columns, scale * rows),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _show_image(ax: Any, image: torch.Tensor, name: str) -> None:
    ax.imshow(image)
    ax.set_title(name.replace("_", " "), fontsize=7)


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    try:
        auto_cli(
            [activations, concentration, local_predictions, components, zoo, curves],
            as_positional=False,
        )
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")

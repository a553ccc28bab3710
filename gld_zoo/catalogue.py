"""What the zoo holds, in words: its models, their weights, and the recipes."""

from __future__ import annotations

import itertools
import textwrap

import timm
import torch
from timm.models import get_pretrained_cfg

from gld_zoo import recipes
from gld_zoo.output import CommandError
from gld_zoo.results import Results, Row


def list_models() -> str:
    """Return the zoo's models as a table: parameters, image size, weights and their top-1."""
    weights = Results.load().weights
    lines = [
        f"{'model':<16}{'parameters':>12}  {'pixels':<7}"
        "weights (top-1 on CIFAR-100), the default first"
    ]
    for name in timm.list_models("gld_*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(weight.numel() for weight in model.parameters())
        tags = [
            f"{tag.partition('.')[2]} ({weights[tag].runs[0].top1:.2f} %)"
            for tag in _default_first(weights, name)
        ]
        size = model.pretrained_cfg["input_size"][-1]
        lines.append(f"{name:<16}{parameters:>12,}  {size:<7}{', '.join(tags) or '-'}")
    return "\n".join(lines)


def list_recipes() -> str:
    """Return the names of the package's recipes, a line for those that begin alike."""
    alike = itertools.groupby(recipes.names(), key=lambda name: name.partition("_")[0])
    lines = [textwrap.fill(", ".join(names), 100, subsequent_indent="  ") for _, names in alike]
    return "\n".join(["recipes, which gld-zoo info NAME shows:", *lines])


def describe(name: str) -> str:
    """Return what is known of a model of the zoo and of each of its weights, or of a recipe.

    Args:
        name: Of a model, a model and its tag (also of another package, as of a teacher on record),
            or a recipe.

    Raises:
        CommandError: If the zoo does not hold it.
    """
    if name in recipes.names():
        return describe_recipe(name)
    results = Results.load()
    architecture, _, tag = name.partition(".")
    names = timm.list_models("gld_*")
    if architecture not in names:
        if name in results.rows:
            return "\n".join([name, *_told(name, results.rows[name])])
        raise CommandError(
            f"{name!r} is neither a model of this zoo nor a recipe; it holds {', '.join(names)}, "
            f"and the recipes {', '.join(recipes.names())}"
        )
    rows = results.rows if tag else results.weights
    tags = _default_first(rows, architecture)
    lines = [name]
    if not tag or name in timm.list_models(f"{architecture}.*", include_tags=True):
        cfg = get_pretrained_cfg(name)
        paper = cfg.paper_ids or "-"
        lines.append(f"  licence {cfg.license}, paper {paper}, pixels {cfg.input_size}")
    elif name not in tags:
        raise CommandError(
            f"{name!r} is not on record; {architecture} has {', '.join(tags) or 'no weights'}"
        )
    chosen = [key for key in tags if not tag or key == name]
    for key in chosen:
        lines += _told(key, rows[key])
    return "\n".join(lines if chosen else [*lines, "  no weights ship; train it by its recipe"])


def _told(name: str, row: Row) -> list[str]:
    run = row.runs[0]
    return [
        f"  {name}: top-1 {run.top1:.2f} %, top-5 {run.top5:.2f} % on {row.dataset}, "
        f"epoch {row.epochs}",
        f"    teacher {row.teacher.name if row.teacher else 'none'}",
        f"    recipe {row.recipe}, changes {row.told_changes()}",
        f"    seed {run.seed}, on {row.hardware}, {row.precision}",
        f"    {row.file or 'its weights do not ship'}, sha256 {row.sha256}",
    ]


def describe_recipe(name: str) -> str:
    """Return a recipe's file, and what it scored in our own runs.

    Raises:
        ValueError: If there is none of that name.
    """
    text = recipes.path_of(name).read_text(encoding="utf-8").rstrip()
    rows = {key: row for key, row in Results.load().rows.items() if row.recipe == name}
    scored = [
        f"# on record: {key}, changes {row.told_changes()}: top-1 {row.mean()} %"
        for key, row in rows.items()
    ]
    return "\n".join([f"# {recipes.path_of(name)}", text, *scored])


def _default_first(trained: dict[str, Row], architecture: str) -> list[str]:
    """Return the names of an architecture's weights, first those that `pretrained=True` gives."""
    found = [name for name in trained if name.split(".")[0] == architecture]
    default = get_pretrained_cfg(architecture).tag
    return sorted(found, key=lambda name: name != f"{architecture}.{default}")

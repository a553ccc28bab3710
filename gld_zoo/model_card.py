"""A model's card for the hub: what was measured, how to use and repeat it, terms and citation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import parse_model_name

from gld_zoo.results import Row, TeacherRecord

CIFAR100 = "uoft-cs/cifar100"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CIFAR100_USE = (
    "Not for decisions about people, nor for images unlike CIFAR-100's: 100 everyday classes, one "
    "centred object, 32 x 32 pixels."
)
CIFAR100_TERMS = (
    "CIFAR-100 comes from web search, with its biases; its licence is unknown, and about 10 % of "
    "its test images have a near-duplicate in training (Barz and Denzler, arXiv:1902.00423)."
)
OWN_RECIPE = "recipe.yaml"  # of a row whose options are no change of a recipe that ships
LISTED = 20  # classes that a card names
TAGS = ["timm", "image-classification"]


def model_card(
    model: Any,
    results: dict[str, Any] | None,
    repo_id: str,
    label_names: Sequence[str] | None = None,
) -> ModelCard:
    """Return a card: what was measured, how to use and repeat it, terms and citation.

    The scores are in the hub's own metadata too, where its leaderboards and searches look.

    Args:
        model: A timm model.
        results: A row of this package's results.json, or one like it: `dataset` (hub id, or any
            name), `teacher` (its name or a `TeacherRecord`'s fields, None for labels alone),
            `parameters`, `recipe`, `changes`, `precision`, `hardware`, `sha256` and `runs`, whose
            first has `seed`, `commit`, `top1`, `top5`, `best_epoch` and `best_epoch_top1` (and
            `best_epoch_split`, 'test' without it). Optional are `license`, a hub identifier,
            `by_gld`, false if the teacher taught by a part of GLD's loss or by another (without it
            GLD is credited), `finetuned_from`, the name of the weights it began with, `selected`,
            true if they are the best epoch's instead of the last, `test_split`, the name of the
            split measured on, and `files`, lines about other files. None is for a model of which
            nothing was measured, and the card says so.
        repo_id: ORG/NAME, where the model will be.
        label_names: Of its classes in order; None takes those of its cfg, if there are any.

    Raises:
        ValueError: If something is missing in `results`; it names what.
    """
    row = None if results is None else Row.from_dict(results)
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    filled = text.format(
        repo_id=repo_id,
        architecture=model.pretrained_cfg["architecture"],
        parameters=sum(weight.numel() for weight in model.parameters()),
        register=", gld_zoo  # gld_zoo registers the architecture" * _is_own(model),
        origin=_origin(row),
        classes=_classes(label_names or model.pretrained_cfg.get("label_names") or ()),
        results=_results(row),
        repeat=_repetition(row),
        use=_use(row),
        terms=_terms(row),
        licence=(row and row.license) or "none is stated",
    )
    return ModelCard(f"---\n{_metadata(row, repo_id).to_yaml()}\n---\n\n{filled}")


def _is_own(model: Any) -> bool:
    return bool(model.pretrained_cfg["architecture"].startswith("gld_"))


def is_cifar100(row: Row) -> bool:
    """Tell whether a row was measured on CIFAR-100, by any of its names."""
    return row.dataset in ("cifar100", CIFAR100)


def _title(row: Row) -> str:
    return "CIFAR-100" if is_cifar100(row) else row.dataset


def _origin(row: Row | None) -> str:
    if row is None:
        return "with weights of unstated origin"
    start = f"fine-tuned from `{row.finetuned_from}`, " if row.finetuned_from else ""
    if not row.teacher:
        return f"{start}trained by gld_zoo on the labels alone"
    origin = f"{start}distilled{' by GLD' * row.by_gld} from {_teacher(row.teacher)} with gld_zoo"
    paper = '"Distilling Global and Local Logits with Densely Connected Relations"'
    return origin + f": {paper} (Kim et al., ICCV 2021)" * row.by_gld


def _teacher(teacher: TeacherRecord) -> str:
    notes = ["a linear head fitted to it"] if teacher.fitted_head else []
    notes += [f"top-1 {teacher.top1:.2f} %"] if teacher.top1 is not None else []
    return f"`{teacher.name}`" + (f" ({', '.join(notes)})" if notes else "")


def _classes(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} others" if len(names) > LISTED else ""
    return f" It knows {len(names)} classes: {', '.join(names[:LISTED])}{more}."


def _results(row: Row | None) -> str:
    if row is None:
        return "Nothing was measured."
    run = row.runs[0]
    split = row.test_split if run.best_epoch_split == "test" else run.best_epoch_split
    text = (
        f"{_title(row)}, {row.test_split} images, in float32: top-1 {run.top1:.2f} %, top-5 "
        f"{run.top5:.2f} %. Nothing was selected on these images; the weights are those of the "
        f"{'best' if row.selected else 'last'} epoch, and the run's best one on the {split} images "
        f"was epoch {run.best_epoch} with {run.best_epoch_top1:.2f} %."
    )
    return "\n\n".join(
        [text, *(["\n".join(f"- {line}" for line in row.files)] if row.files else [])]
    )


def _repetition(row: Row | None) -> str:
    if row is None:
        return "How it was trained is not stated."
    run = row.runs[0]
    recipe = f"Recipe `{row.recipe}` of gld_zoo (commit {run.commit}), changed options: "
    recipe += row.told_changes()
    if row.recipe == OWN_RECIPE:
        recipe = (
            f"`{OWN_RECIPE}` beside this card holds every option (gld_zoo, commit {run.commit})"
        )
    return (
        f"{recipe}; seed {run.seed}, precision {row.precision}, on {row.hardware}. "
        f"sha256 of the weights: {row.sha256}."
    )


def _use(row: Row | None) -> str:
    if row is None:
        return ""
    return CIFAR100_USE if is_cifar100(row) else f"Not for images unlike those of {_title(row)}."


def _terms(row: Row | None) -> str:
    if row is None:
        return "The training data is not stated."
    if is_cifar100(row):
        return CIFAR100_TERMS
    if HUB_ID.fullmatch(row.dataset):
        return f"The terms of {row.dataset} are in its own card."
    return f"Trained on {row.dataset}, images of whoever publishes this, whose terms are theirs."


def _metadata(row: Row | None, repo_id: str) -> ModelCardData:
    """Return what the hub's leaderboards and searches read."""
    common: dict[str, Any] = dict(
        model_name=repo_id.split("/")[-1],
        library_name="timm",
        pipeline_tag="image-classification",
        tags=TAGS + ["knowledge-distillation"] * bool(row and row.teacher),
    )
    if row is None:
        return ModelCardData(**common)
    dataset = row.dataset
    hub_id = CIFAR100 if is_cifar100(row) else dataset if HUB_ID.fullmatch(dataset) else None
    measured: dict[str, Any] = dict(
        task_type="image-classification",
        dataset_type=hub_id or re.sub(r"[^\w.-]+", "-", dataset, flags=re.ASCII),
        dataset_name=_title(row),
        dataset_split=row.test_split,
    )
    scores = (("Top-1", row.runs[0].top1), ("Top-5", row.runs[0].top5))
    names = (row.finetuned_from, row.teacher.name if row.teacher else None)
    return ModelCardData(
        **common,
        license=row.license,
        datasets=[hub_id] if hub_id else None,
        base_model=[found for name in names if (found := _hub_id(name))] or None,
        eval_results=[
            EvalResult(metric_type="accuracy", metric_name=name, metric_value=value, **measured)
            for name, value in scores
        ],
    )


def _hub_id(name: str | None) -> str | None:
    """Return the hub id in a timm name that has one."""
    if not name:
        return None
    source, model = parse_model_name(name)
    return model.partition("@")[0] if source == "hf-hub" else None

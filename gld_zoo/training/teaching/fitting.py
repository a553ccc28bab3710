"""A teacher's head: fitted once to the features of the training images, and kept in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from gld_zoo.distillation.teacher import HEAD_FILE, LinearHead, Teacher
from gld_zoo.hub import save_tensors
from gld_zoo.training.build.fitted_head import (
    HELD_OUT,
    PENALTIES,
    check_features_fit,
    choose_penalty,
    fit_classifier,
)
from gld_zoo.training.common.disk import replacing, sha256, write_json
from gld_zoo.training.data.batches import EvalBatches
from gld_zoo.training.data.rows import Rows, drawn_by_class
from gld_zoo.training.teaching.together import of_all_processes

FACTS = str(Path(HEAD_FILE).with_suffix(".json"))


class FittedHead(NamedTuple):
    """A head, and what is known of it: its `penalty`, the `images` it was fitted to, its hash."""

    head: LinearHead
    facts: dict[str, Any]


def load_head(weights: Path, of: str) -> FittedHead | None:
    """Return a head that was written for a teacher; None if there is none that is whole.

    Args:
        weights: Its file, with a JSON of the same name beside it.
        of: Hash of the teacher.
    """
    try:
        facts = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["teacher"] != of or facts["sha256"] != sha256(weights):
            return None
        return FittedHead(LinearHead(**load_file(weights)), facts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def save_head(fitted: FittedHead, weights: Path) -> None:
    """Write a head and its facts.

    Raises:
        DiskError: If the disk refuses.
    """
    with replacing(weights) as temporary:
        save_tensors(fitted.head.state_dict(), temporary)
    facts = dict(fitted.facts, sha256=sha256(weights))
    write_json(weights.with_suffix(".json"), facts)


def fit_head(
    teacher: Teacher, rows: Rows, batches: EvalBatches, accelerator: Accelerator, of: str
) -> FittedHead | None:
    """Fit a head to a teacher's global features of the training images; None but in the main one.

    Multinomial logistic regression on standardised features, to its optimum; its L2 penalty is the
    best on a tenth of the images, held out class by class, then all are used. Nothing is drawn but
    that tenth, always the same.

    Args:
        teacher: Whose features.
        rows: The training images.
        batches: These images, as they are measured; each process its share.
        accelerator: Of the run.
        of: Hash of the teacher.

    Raises:
        DataError: If the features do not fit into memory, or no class has two images.

    Source: GLD (ICCV 2021), section 4, of whose fine-grained teachers the classifier alone is
    trained; the fit is ours.
    """
    width = teacher.layout.values.shape[1]
    remedy = "train a teacher on them instead (teacher: null, finetune: classifier)"
    check_features_fit(width, len(rows), views=1, remedy=remedy)
    features = of_all_processes(
        lambda images: teacher.features(images)[:, 0], batches, len(rows), accelerator
    )[:, None]
    if not accelerator.is_main_process:
        return None
    labels = rows.labels()
    held = drawn_by_class(labels, rows.classes, HELD_OUT, 0)
    penalty = PENALTIES[0]
    if held.any():
        kept = features[~held], labels[~held]
        penalty = choose_penalty(kept, (features[held], labels[held]), rows.classes)
    head = fit_classifier(features, labels, rows.classes, penalty).float()
    facts = dict(teacher=of, images=len(rows), penalty=penalty)
    return FittedHead(head, facts)


@torch.no_grad()
def top1_by_row(teacher: Teacher, batches: EvalBatches, accelerator: Accelerator) -> list[float]:
    """Return the top-1 in % of a teacher's global row, then of each cell, over all processes."""
    hits, count = 0, 0
    for images, target in batches:
        hits = hits + (teacher(images).argmax(-1) == target[:, None]).sum(0)
        count += len(target)
    sums = torch.cat([torch.as_tensor(hits), torch.tensor([count]).to(hits)]).double()
    *right, total = accelerator.reduce(sums).tolist()
    return [100 * value / total for value in right]

"""Train a student by the relations of a teacher's features alone, with labels or without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator

from gld_zoo.distillation.losses import RelationLoss
from gld_zoo.distillation.maps import global_local_features
from gld_zoo.training.common.errors import DataError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Data, EvalBatches, Share
from gld_zoo.training.engine.task import Terms
from gld_zoo.training.tasks.distiller import Distiller
from gld_zoo.training.tasks.labels import accuracy, smooth
from gld_zoo.training.teaching.together import of_all_processes

COMPARED = 10_000  # images of the test split, the first ones, whose neighbours are compared
BLOCK = 1000  # of which distances to all are held at a time


class RelationDistiller(Distiller):
    """Trains a student so that its features stand to each other as its teacher's do.

    With labels cross-entropy stands beside that. Without any it is the whole loss, the student has
    no classifier, and its score is the agreement of nearest neighbours: of how many images it has
    the same neighbour among the others as its teacher.

    Arguments and errors are the `Task`'s.
    """

    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the images, the student, and the student with its features."""
        built = super().build(share)
        self.neighbours: torch.Tensor | None = None
        if not self.source.is_labelled:
            try:
                names = ("ce_weight", "label_smoothing", "allow_empty_classes")
                self.recipe.refuse("has no effect on images without labels", *names)
            except ValueError as error:
                raise DataError(str(error)) from error
            self.metric, self.metric_title = "agreement", "neighbours as the teacher's"  # type: ignore[misc]
        return built

    def build_loss(self, recipe: Recipe) -> nn.Module:
        """Return the relation's loss."""
        return RelationLoss(
            recipe.relation_weight,
            ce_weight=1.0 if recipe.ce_weight is None else recipe.ce_weight,
            global_batch=True,
        )

    def forward(
        self, images: torch.Tensor, target: torch.Tensor, numbers: torch.Tensor | None = None
    ) -> tuple[Terms, Terms]:
        """Return the loss with its terms, and with labels the accuracy of the logits, in %."""
        if self.recipe.compile:
            torch.compiler.cudagraph_mark_step_begin()
        features, logits = self.network(images)
        assert self.taught_by is not None
        theirs = self.taught_by.rows(images, numbers)
        if logits is None:
            return self.criterion(features, theirs), {}
        scores = accuracy(logits, target)
        if self.recipe.label_smoothing:
            target = smooth(target, logits.shape[-1], self.recipe.label_smoothing)
        return self.criterion(features, theirs, logits, target), scores

    def learns_from(self) -> list[str]:
        """Return what the loss compares the student with, in words."""
        loss: Any = self.criterion
        labels = self.source.is_labelled and loss.ce_weight
        parts = [(labels, "the labels"), (loss.beta, "the relations among the teacher's features")]
        return [words for weight, words in parts if weight] or ["nothing, as every weight is 0"]

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return the student's loss, top-1 and top-5; without labels how its neighbours agree."""
        if self.source.is_labelled:
            return super().measure(model, batches)
        self.share_buffers(model)
        model.eval()
        own = self._nearest(lambda images: global_local_features(model, images, 1)[:, 0], batches)
        theirs = self._neighbours(batches)
        return dict(agreement=100 * (own == theirs).double().mean().item())

    def _neighbours(self, batches: EvalBatches) -> torch.Tensor:
        """Return the teacher's, which of the test split are found once."""
        if batches is self.data.test and self.neighbours is not None:
            return self.neighbours
        assert self.taught_by is not None
        teacher = self.taught_by.teacher

        def features(images: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return teacher.features(images)[:, 0]

        found = self._nearest(features, batches)
        if batches is self.data.test:
            self.neighbours = found
        return found

    def _nearest(
        self, features: Callable[[torch.Tensor], torch.Tensor], batches: EvalBatches
    ) -> torch.Tensor:
        """Return of each image the number of the one whose features are nearest to its own."""
        assert batches.count is not None
        count = min(batches.count, COMPARED)
        return nearest(of_all_processes(features, batches, count, self.accelerator))

    def conclusion(self, summary: dict[str, Any], before: str, run: Path) -> list[str]:
        """Return what the run came to, and how to load the student."""
        if self.source.is_labelled:
            return super().conclusion(summary, before, run)
        return [
            f"nearest neighbours as the teacher's: {before}, {summary[self.metric]:.2f} % after",
            f"run folder {run}, with curves.png; the student is a backbone: import timm, gld_zoo; "
            f"timm.create_model('local-dir:{run}/last', pretrained=True)",
        ]


def nearest(rows: torch.Tensor) -> torch.Tensor:
    """Return of each of the rows `[N, D]` the number `[N]` of the nearest other one."""
    found = []
    for start in range(0, len(rows), BLOCK):
        distances = torch.cdist(rows[start : start + BLOCK], rows)
        distances[:, start : start + BLOCK].fill_diagonal_(torch.inf)
        found.append(distances.argmin(1))
    return torch.cat(found)


def task_of(recipe: Recipe, accelerator: Accelerator) -> Distiller:
    """Return what a recipe trains."""
    kind = RelationDistiller if recipe.teaches_relations else Distiller
    return kind(recipe, accelerator)

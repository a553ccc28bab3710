"""Train a student by GLD, or on labels alone: a teacher, a baseline."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationEvaluator

from gld_zoo import GLDLoss
from gld_zoo.distillation.maps import grids_of
from gld_zoo.hub import save_pretrained
from gld_zoo.training.build.create import create_frozen, set_training_mode
from gld_zoo.training.build.run_models import build_models
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.config.recipe import PAPER_BETA, Recipe
from gld_zoo.training.data.batches import Data, EvalBatches, NumberedBatches, Share, WithRows
from gld_zoo.training.data.loaders import load_data, split_rows
from gld_zoo.training.data.opening import is_image_folder
from gld_zoo.training.data.sources import facts, open_source
from gld_zoo.training.engine.task import Task, Terms
from gld_zoo.training.runs.on_record import labels_alone
from gld_zoo.training.tasks.labels import accuracy, check_classes, smooth
from gld_zoo.training.teaching.taught import Run, TaughtBy

BUNDLED = "cifar100_mini"  # the images that come with the package, for a first look alone
TELL_FROM = 0.05  # the share of images that fill no batch from which a run tells of them


class Distiller(Task):
    """Trains a student from its teacher's global and local logits; without one, on labels alone.

    Arguments and errors are the `Task`'s.
    """

    metric, metric_title = "top1", "top-1"
    recipe: Recipe

    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the images, the student, and the student with its local logits."""
        recipe, accelerator = self.recipe, self.accelerator
        self.source = open_source(recipe)
        self.empty: list[str] = []
        names = self.source.label_names if self.source.is_labelled else []
        self.models = build_models(recipe, names, accelerator)
        self.student, self.teacher = self.models.student, self.models.teacher
        self.config = self.models.config
        self.criterion = self.build_loss(recipe)
        if recipe.compile and accelerator.num_processes == 1:  # not through collectives
            self.criterion.compile()
        data = load_data(self.source, recipe, self.config, accelerator.device, share)
        if recipe.keeps_answers:
            data = data._replace(train=WithRows(cast(NumberedBatches, data.train)))
        self.taught_by = None
        if self.teacher is not None:
            rows, _ = split_rows(self.source, recipe)
            run = Run(recipe, accelerator, self.source, rows, self.models, data)
            self.taught_by = TaughtBy(run)
        labels = []
        if not recipe.streaming:
            labels = self.source.train.labels().tolist()
            self.empty = check_classes(self.source, allowed=recipe.allow_empty_classes)
        self.source_digests = dict(classes=_digest(self.source.label_names), labels=_digest(labels))
        return data, self.student, self.models.network

    def build_loss(self, recipe: Recipe) -> nn.Module:
        """Return the loss that a recipe's weights make, its relation over all processes' images."""
        return GLDLoss(
            recipe.alpha,
            recipe.relation_weight,
            local_weight=recipe.local_weight,
            global_batch=True,
            temperature=recipe.temperature,
            standardise=recipe.standardise,
            disagreement=recipe.disagreement,
            ce_weight=recipe.ce_weight,
            global_weight=recipe.global_weight,
        )

    def set_training_mode(self) -> None:
        """Set the student to training; what is frozen of it stays in eval mode."""
        super().set_training_mode()
        set_training_mode(self.student, self.recipe.finetune)

    def forward(
        self, images: torch.Tensor, target: torch.Tensor, numbers: torch.Tensor | None = None
    ) -> tuple[Terms, Terms]:
        """Return the loss with its terms, and the accuracy of the global logits, in %.

        Args:
            images: `[B, 3, S, S]`.
            target: Classes `[B]`, or probabilities `[B, K]`.
            numbers: Which images they are `[B]`, where the teacher's answers are kept.
        """
        if self.recipe.compile:
            torch.compiler.cudagraph_mark_step_begin()
        logits = self.network(images)
        smoothing = self.recipe.label_smoothing
        if self.taught_by is None:
            loss = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
            return dict(loss=loss, loss_ce=loss), accuracy(logits, target)
        teacher_logits = self.taught_by.rows(images, numbers)
        if smoothing:
            target = smooth(target, logits.shape[-1], smoothing)
        return self.criterion(logits, teacher_logits, target), accuracy(logits[:, 0], target)

    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return the student's loss, top-1 and top-5."""
        self.share_buffers(model)
        return self._score(model.eval(), batches)

    @torch.no_grad()
    def _score(
        self, predict: Callable[[torch.Tensor], torch.Tensor], batches: EvalBatches
    ) -> dict[str, float]:
        evaluator = ClassificationEvaluator(self.accelerator.device)
        for images, target in batches:
            evaluator.update(predict(images), target)
        return dict(evaluator.compute(distributed=self.accelerator.num_processes > 1))

    def prepare(self, run: Path) -> None:
        """Let the teacher be made ready: its head, its store, its score."""
        if self.taught_by is not None:
            self.taught_by.prepare(run, lambda *each: self._score(*each)["top1"])

    def begin_epoch(self, epoch: int) -> None:
        """Read what is kept of the teacher's answers on the epoch's view."""
        if self.taught_by is not None:
            self.taught_by.begin_epoch(epoch)

    def end_epoch(self, epoch: int) -> None:
        """Complete what is kept of the teacher's answers on the epoch's view."""
        if self.taught_by is not None:
            self.taught_by.end_epoch()

    def save_work(self) -> None:
        """Write the teacher's answers of the epoch so far."""
        if self.taught_by is not None:
            self.taught_by.save_work()

    def introduction(self) -> list[str]:
        """Return what to tell of the data, of options that may surprise, and of the teacher."""
        lines, student = super().introduction(), self.recipe.student
        lines += facts(self.source, self.empty)
        beta = self.recipe.relation_weight
        if self.teacher is not None and beta == self.recipe.scaled_beta != PAPER_BETA:
            lines.append(f"beta {beta:g}: the paper's {PAPER_BETA:g} scaled to the rows of a batch")
        if not self.recipe.finetune and (":" in student or "." in student):
            lines.append(f"{student} begins at random; --finetune all begins with its weights")
        lines += self.taught_by.introduction() if self.taught_by else []
        return [*lines, self.lesson()]

    def lesson(self) -> str:
        """Return a line on what the student learns from, and for how long."""
        *others, last = self.learns_from()
        sources = f"{', '.join(others)} and {last}" if others else last
        epochs, batches = self.recipe.epochs, self.data.train
        line = (
            f"learning from {sources}: {epochs} epoch{'s' * (epochs != 1)} of {len(batches):,} "
            f"batches of {self.recipe.batch_size} images"
        )
        left_out = batches.count - len(batches) * self.recipe.batch_size
        if left_out > TELL_FROM * batches.count:
            line += (
                f"; {left_out} of {batches.count:,}, others in each epoch, fill no batch and are "
                "left out (fewer by a smaller --batch_size)"
            )
        return line

    def learns_from(self) -> list[str]:
        """Return what the loss compares the student with, in words."""
        if self.taught_by is None:
            return ["the labels"]
        loss: Any = self.criterion
        grids = " and ".join(f"{grid}x{grid}" for grid in grids_of(self.recipe.grid))
        parts = [
            (loss.ce_weight, "the labels"),
            (loss.global_weight, "the teacher's logits of whole images"),
            (loss.local_weight, f"the teacher's logits of {grids} cells"),
            (loss.beta, "the relations among all these logits"),
        ]
        return [words for weight, words in parts if weight] or ["nothing, as every weight is 0"]

    def remembered(self) -> dict[str, Any]:
        """Return the scores that need not be measured again, and of which weights they are."""
        teacher = self.taught_by.remembered() if self.taught_by else {}
        return dict(super().remembered(), teacher=teacher)

    def recall(self, remembered: dict[str, Any]) -> None:
        """Take over what `remembered` returned, the teacher's score if it is of these weights."""
        super().recall(remembered)
        if self.taught_by is not None:
            self.taught_by.recall(remembered.get("teacher", {}))

    def describe_model(self) -> str:
        """Return the student's name."""
        height, width = self.config["input_size"][1:]
        return f"student {self.recipe.student} on {width}x{height} images"

    def describe_origin(self) -> str:
        """Return which weights it starts from."""
        return "pretrained" if self.recipe.finetune else "random weights"

    def conclusion(self, summary: dict[str, Any], before: str, run: Path) -> list[str]:
        """Return what the run came to, and how to load the student."""
        lines = []
        if self.taught_by is not None and self.taught_by.top1 is not None:
            lines.append(f"teacher {self.taught_by.top1:.2f} %")
            if (alone := labels_alone(self.recipe)) is not None:
                gain = summary["top1"] - alone
                lines.append(
                    f"on the labels alone the same recipe gave {alone:.2f} % (on record, one "
                    f"seed): distillation brought {gain:+.2f} points"
                )
        return [
            *lines,
            f"student {before}, {summary['top1']:.2f} % after",
            f"run folder {run}, with curves.png; the student: import timm, gld_zoo; "
            f"timm.create_model('local-dir:{run}/last', pretrained=True)",
            *self.next_steps(run),
        ]

    def next_steps(self, run: Path) -> list[str]:
        """Return what people may want to do with a finished run."""
        folder = self.recipe.dataset
        examples = f" --examples {shlex.quote(folder)}" if is_image_folder(folder) else ""
        steps = [
            f"to see what it sees where: gld-zoo explain IMAGE --model {run} -o OUT.png, or in a "
            f"browser gld-zoo demo --model {run}{examples}"
        ]
        if self.taught_by is not None and self.source.is_labelled:
            without = "--teacher null" + (" --views null" if self.recipe.views else "")
            steps += [
                "to know what the teacher brought: gld-zoo distill --config "
                f"{run}/recipe.yaml {without} --run {run}-alone, and then "
                f"gld-zoo compare {run}-alone {run}"
            ]
        if Path(self.source.name).name == BUNDLED:
            return [
                *steps,
                "to teach one on photographs of your own, a folder of them for each class: "
                "gld-zoo distill --dataset FOLDER --teacher NAME --teacher_head fit --student NAME "
                "(docs/own_photos.md)",
            ]
        return [*steps, f"to publish it: gld-zoo export {run} FOLDER --push ORG/NAME"]

    def more_summary(self, run: Path) -> dict[str, Any]:
        """Return the dataset, the teacher, and the top-1 of the weights selected, if any were."""
        more: dict[str, Any] = dict(
            dataset=self.source.name,
            dataset_is_folder=self.source.is_folder,
            test_split=self.source.test_split,
            teacher=self.taught_by.summary() if self.taught_by else None,
        )
        if self.data.val:
            self.accelerator.wait_for_everyone()
            more[f"best_{self.metric}"] = self._measure_best(run)
        return more

    def made_of(self) -> dict[str, Any]:
        """Return the counts of images, hashes of classes and labels, and the teacher's weights."""
        hashes = dict(self.source_digests, teacher=self.models.teacher_sha256)
        # the rows that teach are those that are kept, rounded as they are
        kept = self.recipe.store_dtype if self.recipe.keeps_answers else None
        return dict(super().made_of(), **hashes, kept_answers=kept)

    def _measure_best(self, run: Path) -> float | None:
        best, reason = None, "a process on another machine cannot read it"
        try:
            best = create_frozen(f"local-dir:{run / 'best'}", self.accelerator.device)
        except ModelError as error:  # a run at its end does not fail for it
            reason = str(error)
        missing = torch.tensor(float(best is None), device=self.accelerator.device)
        missing = self.accelerator.reduce(missing)  # all measure, or none
        if best is None or missing.item():
            self.accelerator.print(f"best/ is not measured: {reason}")
            return None
        return self.measure(best, self.data.test)[self.metric]

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write a student to a folder, as timm loads it."""
        names = self.source.label_names if self.source.is_labelled else None
        save_pretrained(model, folder, label_names=names, data_config=self.config)


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]

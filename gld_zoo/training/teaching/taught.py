"""The teacher of a run: its head, its score, and its answers to the student's images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from gld_zoo.distillation.teacher import HEAD_FILE, Teacher
from gld_zoo.training.build.run_models import Models
from gld_zoo.training.common.disk import write_json
from gld_zoo.training.common.errors import DiskError, RunError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Data, EvalBatches, Share, WithRows
from gld_zoo.training.data.loaders import eval_batches
from gld_zoo.training.data.rows import Rows
from gld_zoo.training.data.sources import ImageSource
from gld_zoo.training.teaching.asking import AskedOnce
from gld_zoo.training.teaching.fitting import (
    FACTS,
    fit_head,
    load_head,
    save_head,
    top1_by_row,
)
from gld_zoo.training.teaching.opening import open_store
from gld_zoo.training.teaching.store import Store

Predict = Callable[[torch.Tensor], torch.Tensor]


class Run(NamedTuple):
    """What of a run its teacher is built on."""

    recipe: Recipe
    accelerator: Accelerator
    source: ImageSource
    rows: Rows
    models: Models
    data: Data


class TaughtBy:
    """The teacher of a run.

    `top1` in % is known once it is measured, `cells` are those of its cells where its head was
    fitted, of which `head` tells.

    Args:
        run: What it is built on, a teacher among its models.
    """

    def __init__(self, run: Run) -> None:
        assert run.models.teacher is not None
        self.run = run
        self.teacher: Teacher = run.models.teacher
        self.sha256 = str(run.models.teacher_sha256)
        self.identity = str(run.models.teacher_identity)
        self.top1: float | None = None
        self.cells: list[float] = []
        self.head: dict[str, Any] = {}
        self.asked: AskedOnce | None = None

    def prepare(
        self,
        folder: Path,
        score: Callable[[Predict, EvalBatches], float] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        """Fit its head, open its store, and measure it unless a checkpoint has told its score.

        Args:
            folder: The run's.
            score: Returns the top-1 of what maps images to logits `[B, K]` on a split; None does
                not measure it.
            writes: Whether its answers are to be kept, or those that are be read alone.

        Raises:
            DataError: If a head cannot be fitted to the images.
            RunError: If a process cannot read the head.
            StoreError: If the store is not this run's.
        """
        recipe, accelerator = self.run.recipe, self.run.accelerator
        store, answers = open_store(self.run) if recipe.keeps_answers else (None, None)
        if self.teacher.kind == "fit":
            self._take_head(folder, store)
        if score is not None and self.top1 is None:
            self._measure(score)
            self._note_scores(folder)
        names = dict(bf16=torch.bfloat16, fp16=torch.float16)
        self.teacher.keep_in(names.get(accelerator.mixed_precision))
        if store is not None and answers is not None:
            assert isinstance(self.run.data.train, WithRows)
            batches = self.run.data.train.batches
            size = recipe.batch_size // accelerator.num_processes
            self.asked = AskedOnce(
                self.teacher,
                store,
                answers,
                batches,
                accelerator,
                size,
                head=self.head.get("sha256"),
            )
            if writes:
                self.asked.begin_writing()
            if self.head and self.asked.writes and accelerator.is_main_process:
                self._keep_head(folder)

    def _take_head(self, folder: Path, store: Store | None) -> None:
        """Give the teacher the run's head, the store's, or one that is fitted now."""
        accelerator, rows = self.run.accelerator, self.run.rows
        own = folder / HEAD_FILE
        kept = load_head(store.folder / HEAD_FILE, self.identity) if store else None
        found = load_head(own, self.identity) or kept
        if found is None:
            accelerator.print(
                f"fitting a linear head to what {self.run.recipe.teacher} sees in {len(rows):,} "
                "training images"
            )
            images = self._training_images()
            found = fit_head(self.teacher, rows, images, accelerator, self.identity)
        accelerator.wait_for_everyone()  # all have looked
        if accelerator.is_main_process and found and not load_head(own, self.identity):
            save_head(found, own)
        accelerator.wait_for_everyone()
        head = load_head(own, self.identity)
        if head is None:
            raise RunError(
                f"{own} cannot be read by a process; several machines must share the run folder's "
                "disk"
            )
        self.head = head.facts
        self.teacher.set_head(head.head.to(accelerator.device))

    def _keep_head(self, folder: Path) -> None:
        """Keep the run's head in the store, for runs that have none yet."""
        assert self.asked is not None
        head = load_head(folder / HEAD_FILE, self.identity)
        place = self.asked.store.folder / HEAD_FILE
        if head and not load_head(place, self.identity):
            try:
                save_head(head, place)
            except DiskError as error:
                self.asked.refusal = str(error)

    def _training_images(self) -> EvalBatches:
        """Return the training images as they are measured."""
        recipe, accelerator = self.run.recipe, self.run.accelerator
        config = self.run.models.config
        return eval_batches(
            self.run.rows,
            config,
            config["input_size"][-1],
            accelerator.device,
            batch_size=recipe.eval_batch_size,
            share=Share(accelerator.process_index, accelerator.num_processes),
            workers=recipe.workers,
            in_memory=False,  # they are read once
        )

    def _measure(self, score: Callable[[Predict, EvalBatches], float]) -> None:
        if self.teacher.kind == "own":
            self.top1 = score(self.teacher.classify, self.run.data.test)
        elif self.teacher.kind == "fit":
            accelerator = self.run.accelerator
            self.top1, *self.cells = top1_by_row(self.teacher, self.run.data.test, accelerator)

    def _note_scores(self, folder: Path) -> None:
        """Write what a fitted head scored beside it."""
        if self.head and self.run.accelerator.is_main_process:
            facts = dict(self.head, top1=self.top1, cells=self.cells)
            write_json(folder / FACTS, facts)

    def rows(self, images: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        """Return its rows `[B, 1+L, K]` for a batch, those that are kept if they are.

        Args:
            images: The student's, `[B, 3, S, S]`.
            numbers: Which they are of the training split `[B]`, where answers are kept.
        """
        if self.asked is not None and numbers is not None:
            return self.asked.rows(images, numbers)
        with self.run.accelerator.autocast():
            return self.teacher(images)

    def begin_epoch(self, epoch: int) -> None:
        """Read what is kept of its answers on the epoch's view."""
        if self.asked is not None:
            assert self.run.recipe.views is not None
            self.asked.begin(epoch % self.run.recipe.views)

    def end_epoch(self) -> None:
        """Complete what is kept of the epoch's view."""
        if self.asked is not None and (told := self.asked.end()):
            self.run.accelerator.print(told)

    def save_work(self) -> None:
        """Write its answers of the epoch so far."""
        if self.asked is not None:
            self.asked.save()

    def introduction(self) -> list[str]:
        """Return what to tell of it before training."""
        line = f"teacher {self.run.recipe.teacher}"
        if self.head:
            line += (
                f", its head fitted to {self.head['images']:,} training images (L2 "
                f"{self.head['penalty']:g}, the best on a tenth of them)"
            )
        if self.top1 is not None:
            line += f": top-1 {self.top1:.2f} %"
        elif self.teacher.kind == "none":
            line += ": its classes are not used, the relations of its features teach"
        if self.cells:
            line += ", of its cells alone " + " ".join(f"{top1:.1f}" for top1 in self.cells)
        return [line, *([self.asked.standing()] if self.asked else [])]

    def remembered(self) -> dict[str, Any]:
        """Return its score, and of which teacher that is."""
        return dict(sha256=self.sha256, identity=self.identity, top1=self.top1, cells=self.cells)

    def recall(self, remembered: dict[str, Any]) -> None:
        """Take over what `remembered` returned, if it is of this teacher."""
        same = remembered.get("identity", self.identity) == self.identity
        if remembered.get("sha256") == self.sha256 and same:
            self.top1 = remembered.get("top1")
            self.cells = remembered.get("cells", [])

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` tells of it."""
        told: dict[str, Any] = dict(
            name=self.run.recipe.teacher, sha256=self.sha256, top1=self.top1
        )
        if self.head:
            told["head"] = dict(self.head, top1=self.top1, cells=self.cells)
        return told

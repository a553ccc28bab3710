"""One training loop for students, teachers and baselines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from tqdm.auto import tqdm

from batches import EvalBatches, Share, derive_seed
from build import build_models
from checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from gld_zoo import GLDLoss
from interruption import CHECK_EVERY, Interruption, Stopped
from loaders import load_data, open_source
from models import (
    ModelError,
    create_frozen,
    set_training_mode,
)
from recipe import Recipe
from run_folder import RunError, RunFolder, summarize
from sources import DataError
from totals import Totals

BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n}/{total} {elapsed}<{remaining}{postfix}"


class Trainer:
    """One training loop for students, teachers and baselines.

    Args:
        recipe: The run's options.
        run: Its folder.
        accelerator: Device, precision and processes.

    Raises:
        DataError: If the dataset does not fit the recipe.
        ModelError: If a model does not.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.run = run
        self.accelerator = accelerator
        self.source = open_source(recipe)
        self.models = build_models(recipe, len(self.source.label_names), accelerator)
        self.student, self.teacher = self.models.student, self.models.teacher
        self.config = self.models.config
        share = Share(accelerator.process_index, accelerator.num_processes)
        self.data = load_data(self.source, recipe, self.config, accelerator.device, share)
        self._prepare()
        self.position = (0, 0)  # epochs done, steps done of the next one
        self.totals = Totals(accelerator.device)

    def _prepare(self) -> None:
        recipe = self.recipe
        self.criterion = GLDLoss(
            recipe.alpha, recipe.beta, local_weight=recipe.local_weight, global_batch=True
        )
        optimizer = torch.optim.SGD(
            [weight for weight in self.student.parameters() if weight.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )
        # the loaders and the learning rate stay ours: each process takes its share of a global
        # batch by itself
        self.network, self.optimizer = self.accelerator.prepare(self.models.network, optimizer)

    def restore(self) -> None:
        """Load the newest undamaged checkpoint, if there is any."""
        damaged: list[Path] = []
        for path in reversed(list_checkpoints(self.run.checkpoints)):
            try:
                tensors, state = load_checkpoint(path)
            except CheckpointError as error:
                self.accelerator.print(f"{error}; trying the one before")
                damaged.append(path)
                continue
            self.student.load_state_dict(tensors["model"])
            load_optimizer_tensors(self.optimizer, tensors["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.totals.load(state["totals"])
            self.position = (state["epoch"], state["step"])
            self._check_agreement()
            self.run.rewind(state["history"], self.accelerator)
            self.run.set_aside(damaged, self.accelerator)
            return
        self._check_agreement()
        if damaged:
            raise RunError(
                f"no checkpoint in {self.run.checkpoints} is usable; put one back from a copy, or "
                "delete the run folder to start anew"
            )
        self.accelerator.print(f"{self.run.path} holds no checkpoint yet; starting anew")

    def _check_agreement(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        epoch, step = self.position
        seen = torch.tensor([epoch, step, -epoch, -step], device=self.accelerator.device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        if (seen[:2] + seen[2:]).any():
            raise RunError(
                f"the processes see different checkpoints in {self.run.checkpoints}; several "
                "machines must share the run folder's disk"
            )

    def save(self, epoch: int, step: int) -> None:
        """Write a checkpoint after `epoch` epochs and `step` steps of the next one."""
        totals = self.totals.state(self.accelerator)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.run.checkpoints,
                f"epoch-{epoch:05d}" + (f"-step-{step:07d}" if step else ""),
                dict(model=self.student.state_dict(), optimizer=optimizer_tensors(self.optimizer)),
                dict(
                    epoch=epoch,
                    step=step,
                    totals=totals,
                    scaler=scaler.state_dict() if scaler else None,
                    history=self.run.history,
                ),
                keep=self.recipe.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def fit(self, report: Callable[[dict[str, Any]], None], interruption: Interruption) -> None:
        """Train from where the run stands to its last epoch.

        Args:
            report: Is given each epoch's metrics.
            interruption: Tells when to write a checkpoint, and when to stop.

        Raises:
            Stopped: If a signal or the time limit ended it early; a checkpoint is written.
            NonFiniteLossError: If the loss is infinite or not a number.
            DiskError: If something cannot be written.
        """
        for epoch in range(self.position[0], self.recipe.epochs):
            self.train_one_epoch(epoch, interruption)
            report(self.close_epoch(epoch))
            interruption.written()
            if epoch + 1 < self.recipe.epochs and interruption.stopping():
                raise Stopped(f"stopped by {interruption.cause} after epoch {epoch + 1}")

    def close_epoch(self, epoch: int) -> dict[str, Any]:
        """Measure after an epoch, counted from 0; write its metrics and checkpoint."""
        recipe, split = self.recipe, "val" if self.data.val else "test"
        began = time.perf_counter()
        measured = self.measure(self.data.val or self.data.test)
        trained = self.totals.means(self.accelerator)
        line = dict(
            epoch=epoch + 1,
            lr=recipe.lr_at(epoch),
            **trained,
            **{f"{split}_{name}": value for name, value in measured.items()},
            images_per_second=round(self.totals.per_second() * recipe.batch_size, 1),
            seconds=round(self.totals.seconds + time.perf_counter() - began, 2),
        )
        best = max((past[f"{split}_top1"] for past in self.run.history), default=-1.0)
        self.run.history.append(line)
        self.position = (epoch + 1, 0)
        self.totals = Totals(self.accelerator.device)
        if self.accelerator.is_main_process and self.data.val and measured["top1"] > best:
            self.export("best")
        self.save(epoch + 1, 0)
        if self.accelerator.is_main_process:
            self.run.write_metrics()
        self.accelerator.log(line, step=epoch + 1)
        return line

    def train_one_epoch(self, epoch: int, interruption: Interruption) -> None:
        """Train for one epoch, counted from 0, or for what is left of it."""
        recipe, start = self.recipe, self.position[1]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch)
        self.network.train()
        set_training_mode(self.student, recipe.finetune)
        rank = self.accelerator.process_index
        bar = tqdm(
            self.data.train.epoch(epoch, start),
            desc=f"epoch {epoch + 1}/{recipe.epochs}",
            initial=start,
            total=len(self.data.train),
            bar_format=BAR,
            leave=False,
            # None hides it where nobody watches
            disable=None if self.accelerator.is_local_main_process else True,
        )
        self.totals.start()
        step = start
        try:
            for step, (images, target) in enumerate(bar, start=start + 1):
                # dropout and stochastic depth are the step's, wherever the run was resumed
                torch.manual_seed(derive_seed(recipe.seed, epoch, step, rank))
                logits, terms = self.step(images, target)
                self.totals.add(terms, logits, target)
                if step % CHECK_EVERY == 0 or step in (start + 1, len(self.data.train)):
                    self.totals.check(step, epoch)
                    bar.set_postfix_str(self.postfix(epoch), refresh=False)
                if step < len(self.data.train):
                    self._interrupt(epoch, step, interruption)
        except DataError:  # an image that cannot be read; other processes cannot be asked
            if step > start and self.accelerator.num_processes == 1:
                self._checkpoint(epoch, step)
            raise
        self.totals.stop()

    def step(
        self, images: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Train on a batch; return the global logits `[B, K]` and the loss with its terms.

        Nothing here reads a value from the device.
        """
        if self.recipe.compile:
            torch.compiler.cudagraph_mark_step_begin()
        logits, terms = self.forward(images, target)
        self.accelerator.backward(terms["loss"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits, terms

    def forward(
        self, images: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the student's global logits `[B, K]` and the loss with its terms."""
        logits = self.network(images)
        if self.teacher is None:
            loss = F.cross_entropy(logits.float(), target)
            return logits, dict(loss=loss, loss_ce=loss)
        with self.accelerator.autocast():
            teacher_logits = self.teacher(images)
        return logits[:, 0], self.criterion(logits, teacher_logits, target)

    def _interrupt(self, epoch: int, step: int, interruption: Interruption) -> None:
        save, stop = interruption.due(step)
        if not save:
            return
        self._checkpoint(epoch, step)
        interruption.written()
        if stop:
            raise Stopped(f"stopped by {interruption.cause} at step {step} of epoch {epoch + 1}")

    def _checkpoint(self, epoch: int, step: int) -> None:
        self.totals.check(step, epoch)  # nothing that is not finite is ever saved
        self.totals.stop()
        self.save(epoch, step)
        self.totals.start()

    def postfix(self, epoch: int) -> str:
        """Return what the progress bar shows of the epoch so far."""
        means = self.totals.means()
        terms = " ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in means.items()
            if name.startswith("loss")
        )
        rate = self.totals.per_second() * self.recipe.batch_size
        top1, lr = means["train_top1"], self.recipe.lr_at(epoch)
        # a narrow window cuts the end
        return f"top-1 {top1:.1f} {rate:.0f} images/s lr {lr:g} {terms}"

    def measure(self, batches: EvalBatches) -> dict[str, float]:
        """Return the student's loss, top-1 and top-5."""
        if self.accelerator.num_processes > 1:
            for buffer in self.student.buffers():  # batch norm's statistics: those that are saved
                torch.distributed.broadcast(buffer, src=0)
        return self._evaluate(self.student.eval(), batches)

    def measure_teacher(self) -> float | None:
        """Return the teacher's top-1 on the test split, if there is a teacher."""
        if self.teacher is None:
            return None
        return self._evaluate(self.teacher.classify, self.data.test)["top1"]

    @torch.no_grad()
    def _evaluate(
        self, predict: Callable[[torch.Tensor], torch.Tensor], batches: EvalBatches
    ) -> dict[str, float]:
        """Evaluate in float32 at any training precision: scores belong to the weights alone."""
        evaluator = ClassificationEvaluator(self.accelerator.device)
        for images, target in batches:
            evaluator.update(predict(images), target)
        return dict(evaluator.compute(distributed=self.accelerator.num_processes > 1))

    def finish(self, teacher_top1: float | None) -> dict[str, Any]:
        """Write the student as timm reads it, and the summary that marks the run as finished."""
        measured = self.measure(self.data.test)
        if self.accelerator.is_main_process:
            self.export("last")
        summary = summarize(self.run.history, measured)
        summary.update(
            dataset=self.source.name,
            train_images=self.data.train.count,
            test_images=self.data.test.count,
            teacher=None,
        )
        if self.teacher is not None:
            summary["teacher"] = dict(
                name=self.recipe.teacher, sha256=self.models.teacher_sha256, top1=teacher_top1
            )
        if self.data.val:
            self.accelerator.wait_for_everyone()
            summary["best_top1"] = self._measure_best()
        if self.accelerator.is_main_process:
            self.run.write_json("summary.json", summary)
        self.accelerator.wait_for_everyone()
        return summary

    def _measure_best(self) -> float | None:
        folder = self.run.path / "best"
        try:
            best = create_frozen(f"local-dir:{folder}", self.accelerator.device)
        except ModelError as error:  # a run at its end does not fail for it
            self.accelerator.print(f"best/ is not measured: {error}")
            return None
        return self._evaluate(best, self.data.test)["top1"]

    def export(self, name: str) -> None:
        """Write the student to a folder of the run."""
        names = self.source.label_names
        self.run.export(name, self.student, label_names=names, data_config=self.config)

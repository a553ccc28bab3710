"""One training loop for whatever is trained; what that is, its task says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from timm.utils import ModelEmaV3

from gld_zoo.training.common.disk import write_json
from gld_zoo.training.common.errors import DataError, NonFiniteLossError
from gld_zoo.training.data.batches import EvalBatches, derive_seed
from gld_zoo.training.engine import telling
from gld_zoo.training.engine.interruption import CHECK_EVERY, Interruption, Stopped
from gld_zoo.training.engine.optimizers import build_optimizer, clip_gradients
from gld_zoo.training.engine.state import TrainingState
from gld_zoo.training.engine.task import Task, Terms
from gld_zoo.training.engine.totals import Totals
from gld_zoo.training.runs.run_folder import RunFolder, summarize


class Trainer:
    """Trains a task's model, measures it, and leaves both in the run's folder.

    Args:
        task: What is trained.
        run: The folder of the run.

    Raises:
        ModelError: If the recipe's optimiser cannot train the model.
    """

    def __init__(self, task: Task, run: RunFolder) -> None:
        self.task, self.run = task, run
        self.recipe, self.accelerator = task.recipe, task.accelerator
        self.data = task.data
        # fused, a first step that fp16's scaler skips would leave the momentum uninitialised
        fused = self.device.type in ("cpu", "cuda") and self.accelerator.scaler is None
        optimizer = build_optimizer(self.recipe, task.model, fused=fused)
        average = None
        if self.recipe.ema is not None:
            average = ModelEmaV3(task.model, decay=self.recipe.ema, use_warmup=True)
        # the loaders and the learning rate stay ours: each process takes its share of a global
        # batch by itself
        task.network, self.optimizer = self.accelerator.prepare(task.network, optimizer)
        self.state = TrainingState(task, run, self.optimizer, average)

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.accelerator.device

    @property
    def result(self) -> nn.Module:
        """What the run is for: the average of the model's weights if there is one, or the model."""
        average = self.state.average
        return self.task.model if average is None else average.module

    def restore(self) -> None:
        """Go on from the newest undamaged checkpoint, if there is any."""
        self.state.restore()
        self.write_metrics()

    def write_metrics(self, *, last: bool = False) -> None:
        """Write the lines of all epochs, and their curves if a minute has passed, or at the end."""
        if self.run.history and self.accelerator.is_main_process:
            self.run.write_metrics(self.task.metric, self.task.metric_title, last=last)

    def measure_start(self) -> str:
        """Return a line on the model as it is now, measured unless a checkpoint tells of it."""
        task, state = self.task, self.state
        if state.before:
            return telling.start_line(task, state.position, {})
        scores = task.measure(self.result, self.data.val or self.data.test)
        origin = telling.origin_of(task, state.position)
        state.before = dict(score=scores[task.metric], origin=origin)
        return telling.start_line(task, state.position, state.before)

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
        interruption.begin()
        for epoch in range(self.state.position[0], self.recipe.epochs):
            self.train_one_epoch(epoch, interruption)
            report(self.close_epoch(epoch))
            interruption.written()
            if epoch + 1 < self.recipe.epochs and interruption.stopping():
                raise Stopped(f"stopped by {interruption.cause} after epoch {epoch + 1}")

    def train_one_epoch(self, epoch: int, interruption: Interruption) -> None:
        """Train for one epoch, counted from 0, or for what is left of it."""
        state, steps = self.state, len(self.data.train)
        step = start = state.position[1]
        self.task.begin_epoch(epoch)
        self.task.set_training_mode()
        rank = self.accelerator.process_index
        bar = telling.progress(
            self.data.train.epoch(epoch, start),
            epoch=epoch,
            epochs=self.recipe.epochs,
            start=start,
            steps=steps,
            hidden=not self.accelerator.is_local_main_process,
        )
        state.totals.start()
        self.set_learning_rate(epoch + max(0, step - 1) / steps)
        try:
            for step, batch in enumerate(bar, start=start + 1):
                self.set_learning_rate(epoch + (step - 1) / steps)
                # dropout and stochastic depth are the step's, wherever the run was resumed
                seed_step(derive_seed(self.recipe.seed, epoch, step, rank), self.device)
                state.totals.add(*self.step(*batch))
                if state.average is not None:
                    state.average.update(self.task.model, step=epoch * steps + step)
                if step % CHECK_EVERY == 0 or step in (start + 1, steps):
                    state.totals.check(step, epoch)
                    bar.set_postfix_str(self.postfix(), refresh=False)
                self._interrupt(epoch, step, interruption)
        except DataError:  # an image that cannot be read; other processes cannot be asked
            if step > start and self.accelerator.num_processes == 1:
                self._checkpoint(epoch, step)
            raise
        self.task.end_epoch(epoch)
        state.totals.stop()

    def set_learning_rate(self, epoch: float) -> None:
        """Set the learning rate that the recipe asks for after some epochs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(epoch) * group.get("lr_scale", 1.0)

    def rate(self) -> float:
        """Return the learning rate, before a layer's own factor."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def step(self, *batch: Any) -> tuple[Terms, Terms]:
        """Train on a batch; return its terms and other scalars, as the task's `forward` did.

        Nothing here reads a value from the device.
        """
        terms, others = self.task.forward(*batch)
        self.accelerator.backward(terms["loss"])
        if self.recipe.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            clip_gradients(self.recipe, self.task.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return terms, others

    def images_per_second(self) -> float:
        """Return how many images the epoch trains on a second, over all processes."""
        return self.state.totals.per_second() * self.recipe.batch_size

    def postfix(self) -> str:
        """Return what the progress bar shows of the epoch so far."""
        means = self.state.totals.means()
        return telling.standing(self.task, means, self.rate(), self.images_per_second())

    def _interrupt(self, epoch: int, step: int, interruption: Interruption) -> None:
        save, stop = interruption.due(step, last=step == len(self.data.train))
        if not save:
            return
        self._checkpoint(epoch, step)
        interruption.written()
        if stop:
            raise Stopped(f"stopped by {interruption.cause} at step {step} of epoch {epoch + 1}")

    def _checkpoint(self, epoch: int, step: int) -> None:
        self.state.totals.check(step, epoch)  # nothing that is not finite is ever saved
        self.state.totals.stop()
        self.task.save_work()
        self.state.save(epoch, step)
        self.state.totals.start()

    def close_epoch(self, epoch: int) -> dict[str, Any]:
        """Measure after an epoch, counted from 0, if due; write its metrics and checkpoint."""
        began = time.perf_counter()
        measured = self._measure_if_due(epoch)
        line = self._metrics(epoch, measured, began)
        name = f"{self._split}_{self.task.metric}"
        best = max((past[name] for past in self.run.history if name in past), default=-1.0)
        self.run.history.append(line)
        self.state.position = (epoch + 1, 0)
        self.state.totals = Totals(self.device)
        is_main = self.accelerator.is_main_process
        if is_main and self.data.val and line.get(name, -1.0) > best:
            self.write_model("best")
        self.state.save(epoch + 1, 0)
        self.write_metrics(last=epoch + 1 == self.recipe.epochs)
        self.accelerator.log(line, step=epoch + 1)
        return line

    @property
    def _split(self) -> str:
        return "val" if self.data.val else "test"

    def _measure_if_due(self, epoch: int) -> dict[str, float]:
        """Return the scores on the split that is measured after each epoch, if this is one to."""
        last = epoch + 1 == self.recipe.epochs
        if not last and (epoch + 1) % self.recipe.measure_every:
            return {}
        measured = self.score_of(self.data.val or self.data.test)
        if not math.isfinite(measured.get("loss", 0.0)):
            raise NonFiniteLossError(
                f"the {self._split} loss is {measured['loss']} after epoch {epoch + 1}; try a "
                "smaller lr"
            )
        return measured

    def _metrics(self, epoch: int, measured: dict[str, float], began: float) -> dict[str, Any]:
        """Return an epoch's line of metrics; `began` is when measuring did."""
        totals = self.state.totals
        return dict(
            epoch=epoch + 1,
            lr=self.rate(),
            **totals.means(self.accelerator),
            **{f"{self._split}_{name}": value for name, value in measured.items()},
            images_per_second=round(self.images_per_second(), 1),
            seconds=round(totals.seconds + time.perf_counter() - began, 2),
        )

    def score_of(self, batches: EvalBatches) -> dict[str, float]:
        """Return the result's scores on a split, and beside an average the raw weights' score."""
        metric, scores = self.task.metric, self.task.measure(self.result, batches)
        if self.state.average is not None:
            scores[f"raw_{metric}"] = self.task.measure(self.task.model, batches)[metric]
        return scores

    def write_model(self, name: str) -> None:
        """Write the `result` to a folder of the run, as it is loaded."""
        self.run.replace(name, lambda folder: self.task.write(self.result, folder))

    def finish(self) -> dict[str, Any]:
        """Write the model, and the summary that marks the run as finished."""
        # without a held-out part the last epoch has just measured it
        scores = self.run.history[-1].items()
        measured = {
            name.removeprefix("test_"): value for name, value in scores if name.startswith("test_")
        } or self.score_of(self.data.test)
        if self.accelerator.is_main_process:
            self.write_model("last")
        summary = summarize(self.run.history, measured, self.task.metric)
        summary.update(train_images=self.data.train.count, test_images=self.data.test.count)
        summary.update(self.task.more_summary(self.run.path))
        if self.accelerator.is_main_process:
            write_json(self.run.path / "summary.json", summary)
        self.accelerator.wait_for_everyone()
        return summary

    def close(self) -> None:
        """Let the processes that read images end.

        Left to the garbage collector, each would be waited for in vain: the thread that tells them
        to end may be gone before them.
        """
        del self.data, self.task.data


def seed_step(seed: int, device: torch.device) -> None:
    """Seed what a step draws from: the CPU's generator and that of its device.

    `torch.manual_seed` would seed those of all devices and, where CUDA has not begun, format a
    stack trace at each step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)

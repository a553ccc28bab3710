"""One training loop for whatever is trained; what is trained is said by its subclasses."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from batches import Data, EvalBatches, Share, derive_seed
from checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from interruption import CHECK_EVERY, Interruption, Stopped
from optimizers import build_optimizer, clip_gradients, load_optimizer_state, optimizer_state
from options import Options
from rows import DataError
from run_folder import RunError, RunFolder, summarize
from totals import NonFiniteLossError, Totals

BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n}/{total} {elapsed}<{remaining}{postfix}"


class Trainer(ABC):
    """One training loop; a subclass brings the data, the model, its loss and its scores.

    Args:
        recipe: The run's options.
        run: Its folder.
        accelerator: Device, precision and processes.

    Raises:
        DataError: If the dataset does not fit the recipe.
        ModelError: If a model does not.
    """

    score: ClassVar[str]  # of what `measure` returns, the one to show and to select by
    score_title: ClassVar[str]
    source: Any  # the dataset, which `build` finds; has a `name`

    def __init__(self, recipe: Options, run: RunFolder, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.run = run
        self.accelerator = accelerator
        share = Share(accelerator.process_index, accelerator.num_processes)
        self.data, self.model, network = self.build(share)
        # fused, a first step that fp16's scaler skips would leave the momentum uninitialised
        fused = accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None
        optimizer = build_optimizer(recipe, self.model, fused=fused)
        self.average = None
        if recipe.ema is not None:
            self.average = ModelEmaV3(self.model, decay=recipe.ema, use_warmup=True)
        # the loaders and the learning rate stay ours: each process takes its share of a global
        # batch by itself
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.position = (0, 0)  # epochs done, steps done of the next one
        self.before: dict[str, Any] = {}  # the score before training, and of which weights
        self.totals = Totals(accelerator.device)

    @abstractmethod
    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the data, the model to keep, and the module around it to wrap and train.

        Accelerate patches the forward of what it wraps, so that one must not be the model itself.
        """

    @abstractmethod
    def forward(self, *batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return a training batch's `loss` with its terms, and other scalars to average."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return a model's scores on a split, in float32 at any training precision.

        Args:
            model: The one that is trained, or the average of its weights.
            batches: The split.
        """

    @abstractmethod
    def export(self, name: str) -> None:
        """Write the `result` to a folder of the run, as it is loaded."""

    @property
    def result(self) -> nn.Module:
        """What the run is for: the average of the model's weights if there is one, or the model."""
        return self.model if self.average is None else self.average.module

    def score_of(self, batches: EvalBatches) -> dict[str, float]:
        """Return the result's scores on a split, and beside an average the raw weights' score."""
        scores = self.measure(self.result, batches)
        if self.average is not None:
            scores[f"raw_{self.score}"] = self.measure(self.model, batches)[self.score]
        return scores

    def set_training_mode(self) -> None:
        """Set the model to training."""
        self.network.train()

    def introduction(self) -> list[str]:
        """Return what to tell before training: of the data, and of what is learnt from."""
        data = self.data
        held = f", {data.val.count:,} held out" if data.val else ""
        tests = "" if data.test.count is None else f"{data.test.count:,} "
        counts = f"{data.train.count:,} training and {tests}test images{held}"
        note = self.source.train.note_of_depth()
        return [f"{self.source.name}: {counts}" + (f"; {note}" if note else "")]

    @abstractmethod
    def describe_model(self) -> str:
        """Return the kind and name of what is trained."""

    @abstractmethod
    def describe_origin(self) -> str:
        """Return which weights it starts from, where it does not go on with a run's own."""

    @abstractmethod
    def conclusion(self, summary: dict[str, Any]) -> list[str]:
        """Return what to tell of a finished run."""

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
            self._check_made_of(state.get("made_of", {}))  # which earlier versions did not keep
            self.model.load_state_dict(tensors["model"])
            if self.average is not None:
                self.average.module.load_state_dict(tensors["average"])
            load_optimizer_state(
                self.optimizer, self.model, tensors["optimizer"], state.get("optimizer")
            )
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.totals.load(state["totals"])
            self.recall(state.get("remembered", {}))
            self.position = (state["epoch"], state["step"])
            self._check_agreement()
            self.run.history = list(state["history"])
            if state["history"] and self.accelerator.is_main_process:
                self.run.write_metrics(self.score, self.score_title)
            self.run.set_aside(damaged, self.accelerator)
            return
        self._check_agreement()
        if damaged:
            raise RunError(
                f"no checkpoint in {self.run.checkpoints} is usable; put one back from a copy, or "
                "delete the run folder to start anew"
            )
        self.accelerator.print(f"{self.run.path} holds no checkpoint yet; starting anew")

    def remembered(self) -> dict[str, Any]:
        """Return what a run that goes on need not measure again."""
        return dict(before=self.before)

    def recall(self, remembered: dict[str, Any]) -> None:
        """Take over what `remembered` returned; earlier versions kept nothing."""
        self.before = remembered.get("before", {})

    def measure_start(self) -> str:
        """Return a line on the model as it is now, measured unless a checkpoint tells of it."""
        epoch, step = self.position
        done = f"after {epoch} epochs" + (f" and {step} steps" if step else "")
        if self.before:
            return f"{self.describe_model()}, {done}: going on"
        origin = done if epoch or step else self.describe_origin()
        if self.data.val:
            origin += ", on the images held out"
        score = self.measure(self.result, self.data.val or self.data.test)[self.score]
        self.before = dict(score=score, origin=origin)
        return f"{self.describe_model()}, {origin}: {self.score_title} {score:.2f} %"

    def told_before(self) -> str:
        """Return what the model scored before training, in words."""
        return f"{self.before['score']:.2f} % before ({self.before['origin']})"

    def made_of(self) -> dict[str, Any]:
        """Return what a run must find unchanged when it goes on, as its options do not tell it."""
        return dict(train_images=self.data.train.count, test_images=self.data.test.count)

    def _check_made_of(self, saved: dict[str, Any]) -> None:
        for name, now in self.made_of().items():
            was = saved.get(name, now)
            if was != now:
                raise RunError(
                    f"{self.run.path} was begun with {name} {was} and finds {now} now; put back "
                    "what was changed, or start anew under another --run"
                )

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
        """Write a checkpoint after `epoch` epochs and `step` steps of the next one.

        Raises:
            NonFiniteLossError: If a weight is not finite; nothing is written.
        """
        self._check_weights(epoch, step)
        totals = self.totals.state(self.accelerator)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            tensors, plain = optimizer_state(self.optimizer, self.model)
            average = {} if self.average is None else dict(average=self.average.module.state_dict())
            save_checkpoint(
                self.run.checkpoints,
                f"epoch-{epoch:05d}" + (f"-step-{step:07d}" if step else ""),
                dict(model=self.model.state_dict(), optimizer=tensors, **average),
                dict(
                    epoch=epoch,
                    step=step,
                    optimizer=plain,
                    totals=totals,
                    scaler=scaler.state_dict() if scaler else None,
                    history=self.run.history,
                    made_of=self.made_of(),
                    remembered=self.remembered(),
                ),
                keep=self.recipe.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _check_weights(self, epoch: int, step: int) -> None:
        tensors = self.model.state_dict().items()
        finite = {name: value.isfinite().all() for name, value in tensors}
        if not torch.stack(list(finite.values())).all():
            first = next(name for name, good in finite.items() if not good)
            raise NonFiniteLossError(
                f"{first} is not finite after epoch {epoch} and step {step} of the next; try a "
                "smaller lr"
            )

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
        for epoch in range(self.position[0], self.recipe.epochs):
            self.train_one_epoch(epoch, interruption)
            report(self.close_epoch(epoch))
            interruption.written()
            if epoch + 1 < self.recipe.epochs and interruption.stopping():
                raise Stopped(f"stopped by {interruption.cause} after epoch {epoch + 1}")

    def close_epoch(self, epoch: int) -> dict[str, Any]:
        """Measure after an epoch, counted from 0, if due; write its metrics and checkpoint."""
        recipe, split = self.recipe, "val" if self.data.val else "test"
        began = time.perf_counter()
        last = epoch + 1 == recipe.epochs
        due = last or (epoch + 1) % recipe.measure_every == 0
        measured = self.score_of(self.data.val or self.data.test) if due else {}
        if not math.isfinite(measured.get("loss", 0.0)):
            raise NonFiniteLossError(
                f"the {split} loss is {measured['loss']} after epoch {epoch + 1}; try a smaller lr"
            )
        trained = self.totals.means(self.accelerator)
        line = dict(
            epoch=epoch + 1,
            lr=self.rate(),
            **trained,
            **{f"{split}_{name}": value for name, value in measured.items()},
            images_per_second=round(self.totals.per_second() * recipe.batch_size, 1),
            seconds=round(self.totals.seconds + time.perf_counter() - began, 2),
        )
        name = f"{split}_{self.score}"
        best = max((past[name] for past in self.run.history if name in past), default=-1.0)
        better = due and measured[self.score] > best
        self.run.history.append(line)
        self.position = (epoch + 1, 0)
        self.totals = Totals(self.accelerator.device)
        if self.accelerator.is_main_process and self.data.val and better:
            self.export("best")
        self.save(epoch + 1, 0)
        if self.accelerator.is_main_process:
            self.run.write_metrics(self.score, self.score_title, last=last)
        self.accelerator.log(line, step=epoch + 1)
        return line

    def train_one_epoch(self, epoch: int, interruption: Interruption) -> None:
        """Train for one epoch, counted from 0, or for what is left of it."""
        recipe, start = self.recipe, self.position[1]
        self.set_training_mode()
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
        self.set_learning_rate(epoch + max(0, step - 1) / len(self.data.train))
        try:
            for step, batch in enumerate(bar, start=start + 1):
                self.set_learning_rate(epoch + (step - 1) / len(self.data.train))
                # dropout and stochastic depth are the step's, wherever the run was resumed
                seed_step(derive_seed(recipe.seed, epoch, step, rank), self.accelerator.device)
                self.totals.add(*self.step(*batch))
                if self.average is not None:
                    done = epoch * len(self.data.train) + step
                    self.average.update(self.model, step=done)
                if step % CHECK_EVERY == 0 or step in (start + 1, len(self.data.train)):
                    self.totals.check(step, epoch)
                    bar.set_postfix_str(self.postfix(epoch), refresh=False)
                self._interrupt(epoch, step, interruption)
        except DataError:  # an image that cannot be read; other processes cannot be asked
            if step > start and self.accelerator.num_processes == 1:
                self._checkpoint(epoch, step)
            raise
        self.totals.stop()

    def set_learning_rate(self, epoch: float) -> None:
        """Set the learning rate that the recipe asks for after some epochs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(epoch) * group.get("lr_scale", 1.0)

    def rate(self) -> float:
        """Return the learning rate, before a layer's own factor."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def step(self, *batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Train on a batch; return what `forward` did.

        Nothing here reads a value from the device.
        """
        terms, others = self.forward(*batch)
        self.accelerator.backward(terms["loss"])
        if self.recipe.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            clip_gradients(self.recipe, self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return terms, others

    def _interrupt(self, epoch: int, step: int, interruption: Interruption) -> None:
        save, stop = interruption.due(step, last=step == len(self.data.train))
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
        lr = self.rate()
        score = means.get(f"train_{self.score}")
        shown = "" if score is None else f"{self.score_title} {score:.1f} "
        return f"{shown}{rate:.0f} images/s lr {lr:g} {terms}"  # a narrow window cuts the end

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's batch norm statistics, those that are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def finish(self) -> dict[str, Any]:
        """Write the model, and the summary that marks the run as finished."""
        # without a held-out part the last epoch has just measured it
        scores = self.run.history[-1].items()
        measured = {
            name.removeprefix("test_"): value for name, value in scores if name.startswith("test_")
        } or self.score_of(self.data.test)
        if self.accelerator.is_main_process:
            self.export("last")
        summary = summarize(self.run.history, measured, self.score)
        summary.update(train_images=self.data.train.count, test_images=self.data.test.count)
        summary.update(self.more_summary())
        if self.accelerator.is_main_process:
            self.run.write_json("summary.json", summary)
        self.accelerator.wait_for_everyone()
        return summary

    def close(self) -> None:
        """Let the processes that read images end.

        Left to the garbage collector, each would be waited for in vain: the thread that tells them
        to end may be gone before them.
        """
        del self.data

    def more_summary(self) -> dict[str, Any]:
        """Return what else the summary holds."""
        return {}


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

"""All that changes while a run trains, and its way into a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from gld_zoo.training.common.errors import CheckpointError, NonFiniteLossError, RunError
from gld_zoo.training.engine.optimizers import load_optimizer_state, optimizer_state
from gld_zoo.training.engine.task import Task
from gld_zoo.training.engine.totals import Totals
from gld_zoo.training.runs.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from gld_zoo.training.runs.run_folder import RunFolder


class TrainingState:
    """Where a run stands, and what of it is kept.

    `position` is the epochs done and the steps done of the next one; `before` the score before
    training, and of which weights it is.

    Args:
        task: What is trained.
        run: The run's folder.
        optimizer: As Accelerate prepared it.
        average: Of the model's weights, if there is one.
    """

    def __init__(
        self, task: Task, run: RunFolder, optimizer: Any, average: ModelEmaV3 | None
    ) -> None:
        self.task, self.run = task, run
        self.optimizer, self.average = optimizer, average
        self.accelerator = task.accelerator
        self.position = (0, 0)
        self.before: dict[str, Any] = {}
        self.totals = Totals(self.accelerator.device)

    def save(self, epoch: int, step: int) -> None:
        """Write a checkpoint after `epoch` epochs and `step` steps of the next one.

        Raises:
            NonFiniteLossError: If a weight is not finite; nothing is written.
        """
        self._check_weights(epoch, step)
        totals = self.totals.state(self.accelerator)
        if self.accelerator.is_main_process:
            model, scaler = self.task.model, self.accelerator.scaler
            tensors, plain = optimizer_state(self.optimizer, model)
            average = {} if self.average is None else dict(average=self.average.module.state_dict())
            save_checkpoint(
                self.run.checkpoints,
                f"epoch-{epoch:05d}" + (f"-step-{step:07d}" if step else ""),
                dict(model=model.state_dict(), optimizer=tensors, **average),
                dict(
                    epoch=epoch,
                    step=step,
                    optimizer=plain,
                    totals=totals,
                    scaler=scaler.state_dict() if scaler else None,
                    history=self.run.history,
                    made_of=self.task.made_of(),
                    remembered=dict(before=self.before, **self.task.remembered()),
                ),
                keep=self.task.recipe.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _check_weights(self, epoch: int, step: int) -> None:
        tensors = self.task.model.state_dict().items()
        finite = {name: value.isfinite().all() for name, value in tensors}
        if not torch.stack(list(finite.values())).all():
            first = next(name for name, good in finite.items() if not good)
            raise NonFiniteLossError(
                f"{first} is not finite after epoch {epoch} and step {step} of the next; try a "
                "smaller lr"
            )

    def restore(self) -> None:
        """Load the newest undamaged checkpoint, if there is any.

        Raises:
            DiskError: If the disk does not give what it holds.
            RunError: If all are damaged, the newest is of other data, or the processes see
                different ones.
        """
        damaged: list[Path] = []
        for path in reversed(list_checkpoints(self.run.checkpoints)):
            try:
                tensors, state = load_checkpoint(path)
            except CheckpointError as error:
                self.accelerator.print(f"{error}; trying the one before")
                damaged.append(path)
                continue
            self._take_over(tensors, state)
            self._check_agreement()
            self.run.set_aside(damaged, self.accelerator)
            return
        self._check_agreement()
        if damaged:
            raise RunError(
                f"no checkpoint in {self.run.checkpoints} is usable; put one back from a copy, or "
                "delete the run folder to start anew"
            )
        self.accelerator.print(f"{self.run.path} holds no checkpoint yet; starting anew")

    def _take_over(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._check_made_of(state.get("made_of", {}))  # which earlier versions did not keep
        model = self.task.model
        model.load_state_dict(tensors["model"])
        if self.average is not None:
            self.average.module.load_state_dict(tensors["average"])
        load_optimizer_state(self.optimizer, model, tensors["optimizer"], state.get("optimizer"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.totals.load(state["totals"])
        remembered = state.get("remembered", {})
        self.before = remembered.get("before", {})
        self.task.recall(remembered)
        self.position = (state["epoch"], state["step"])
        self.run.history = list(state["history"])

    def _check_made_of(self, saved: dict[str, Any]) -> None:
        for name, now in self.task.made_of().items():
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

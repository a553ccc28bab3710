"""What the loop asks of whatever is trained; the room `tasks` answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from accelerate import Accelerator

from gld_zoo.training.config.options import Options
from gld_zoo.training.data.batches import Data, EvalBatches, Share

Terms = dict[str, torch.Tensor]


class Task(ABC):
    """What is trained: its data, model, loss and scores, and what people are told of them.

    Args:
        recipe: The run's options.
        accelerator: Device, precision and processes.

    Raises:
        DataError: If the dataset does not fit the recipe.
        ModelError: If a model does not.
    """

    metric: ClassVar[str]  # of what `measure` returns, the one to show and to select by
    metric_title: ClassVar[str]
    source: Any  # the dataset, which `build` finds: has a `name` and `train`, its `ImageRows`

    def __init__(self, recipe: Options, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.data, self.model, self.network = self.build(
            Share(accelerator.process_index, accelerator.num_processes)
        )

    @abstractmethod
    def build(self, share: Share) -> tuple[Data, nn.Module, nn.Module]:
        """Return the data, the model to keep, and the module around it to wrap and train.

        Accelerate patches the forward of what it wraps, so that one must not be the model itself.
        """

    @abstractmethod
    def forward(self, *batch: Any) -> tuple[Terms, Terms]:
        """Return a training batch's `loss` with its terms, and other scalars to average."""

    @abstractmethod
    def measure(self, model: nn.Module, batches: EvalBatches) -> dict[str, float]:
        """Return a model's scores on a split, in float32 at any training precision.

        Args:
            model: The one that is trained, or the average of its weights.
            batches: The split.
        """

    @abstractmethod
    def write(self, model: nn.Module, folder: Path) -> None:
        """Write a model to a folder that is not there yet, as people load it."""

    @abstractmethod
    def describe_model(self) -> str:
        """Return the kind and name of what is trained."""

    @abstractmethod
    def describe_origin(self) -> str:
        """Return which weights it starts from, where it does not go on with a run's own."""

    @abstractmethod
    def conclusion(self, summary: dict[str, Any], before: str, run: Path) -> list[str]:
        """Return what to tell of a finished run.

        Args:
            summary: What its `summary.json` holds.
            before: The score before training, in words.
            run: Its folder.
        """

    def introduction(self) -> list[str]:
        """Return what to tell before training, after `prepare`: of the data, and of the teacher."""
        data = self.data
        held = f", {data.val.count:,} held out" if data.val else ""
        tests = "" if data.test.count is None else f"{data.test.count:,} "
        counts = f"{data.train.count:,} training and {tests}test images{held}"
        note = self.source.train.note_of_depth()
        return [f"{self.source.name}: {counts}" + (f"; {note}" if note else "")]

    def prepare(self, run: Path) -> None:  # noqa: B027  a task need not
        """Do what is left before the first step; a checkpoint, if there is one, has been read.

        Args:
            run: The run's folder.
        """

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027  likewise
        """Be told that the steps of an epoch, counted from 0, or what is left of them come now."""

    def end_epoch(self, epoch: int) -> None:  # noqa: B027  likewise
        """Be told that the last step of an epoch is done."""

    def save_work(self) -> None:  # noqa: B027  likewise
        """Write what would be lost if the run ended now and went on from its checkpoint."""

    def set_training_mode(self) -> None:
        """Set the model to training."""
        self.network.train()

    def remembered(self) -> dict[str, Any]:
        """Return what of the task a run that goes on need not measure again."""
        return {}

    def recall(self, remembered: dict[str, Any]) -> None:  # noqa: B027  likewise
        """Take over what `remembered` returned; earlier versions kept nothing."""

    def made_of(self) -> dict[str, Any]:
        """Return what a run must find unchanged when it goes on, as its options do not tell it."""
        return dict(train_images=self.data.train.count, test_images=self.data.test.count)

    def more_summary(self, run: Path) -> dict[str, Any]:
        """Return what `summary.json` is to hold beside the scores and the counts of images.

        Args:
            run: The run's folder, in which `best/` lies if images were held out.
        """
        return {}

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's batch norm statistics, those that are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

"""What training a detector and a segmenter have in common: a backbone put to work elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn

from gld_zoo.training.build.create import tagged
from gld_zoo.training.build.sync_batch_norm import synchronise_batch_norm
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.config.options import Options, option
from gld_zoo.training.data.batches import Data, Drawing, Share, derive_seed
from gld_zoo.training.data.keyed import Collate, KeyedBatches, KeyedEval, KeyedExamples, ToDevice
from gld_zoo.training.engine.task import Task


@dataclass(frozen=True, kw_only=True)
class TransferRecipe(Options):
    """Which backbone is put to work on what."""

    GROUPS: ClassVar[dict[str, str]] = dict(backbone="model and dataset", **Options.GROUPS)

    backbone: str = option(
        "gld_resnet18", "timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder"
    )
    pretrained: bool = option(True, "start from the backbone's weights instead of random ones")
    dataset: str = option(MISSING, "hub id or folder in hub layout")
    dataset_config: str | None = option(None, "name of one of the dataset's configs")
    dataset_revision: str | None = option(None, "branch, tag or commit on the hub")
    train_split: str = option("train", "split to train on")
    test_split: str | None = option(
        None, "split to measure on; null takes 'test', else 'validation'"
    )
    image_column: str | None = option(
        None, "column of images; null takes the only one, or the usual name"
    )
    workers: int = option(
        2, "processes that read images, for each split", decides=False, at_least=0
    )


class TransferTask(Task):
    """A model built on a timm backbone; arguments and errors are the `Task`'s."""

    recipe: TransferRecipe

    def create(self, factory: Callable[..., nn.Module], *arguments: Any) -> Any:
        """Return a model on its device, its random weights drawn by the recipe's seed.

        Args:
            factory: Takes the backbone's name, `arguments`, and `pretrained_backbone`.
            *arguments: Those between.

        Raises:
            ModelError: If the factory refuses.
        """
        recipe, device = self.recipe, self.accelerator.device
        torch.manual_seed(derive_seed(recipe.seed))
        try:
            model = factory(recipe.backbone, *arguments, pretrained_backbone=recipe.pretrained)
        except ValueError as error:
            raise ModelError(str(error)) from error
        model.to(device)
        model.to(memory_format=torch.channels_last)
        if recipe.sync_batch_norm and self.accelerator.num_processes > 1:
            model = synchronise_batch_norm(model, device)
        return model

    def read(
        self,
        share: Share,
        to_device: ToDevice,
        *,
        train: KeyedExamples,
        train_collate: Collate,
        test: KeyedExamples,
        test_collate: Collate,
    ) -> Data:
        """Return batches of examples.

        Args:
            share: This process's part.
            to_device: Moves a batch to its device.
            train: Examples to train on.
            train_collate: Makes a batch of them.
            test: Examples to measure on.
            test_collate: Makes a batch of those.

        Raises:
            DataError: If they do not fit the recipe.
        """
        recipe = self.recipe
        share.batch_size(recipe.batch_size)
        options: dict[str, Any] = dict(
            share=share,
            workers=recipe.workers,
            pin=self.accelerator.device.type == "cuda",
        )
        return Data(
            KeyedBatches(
                train,
                train_collate,
                to_device,
                batch_size=recipe.batch_size,
                drawing=Drawing(recipe.seed),
                **options,
            ),
            KeyedEval(test, test_collate, to_device, batch_size=recipe.eval_batch_size, **options),
        )

    def describe_origin(self) -> str:
        """Return which weights it starts from."""
        if not self.recipe.pretrained:
            return "random weights"
        return f"weights of {tagged(self.recipe.backbone)}"

    def how_to_use(self, run: Path) -> str:
        """Return how to see the finished model at work."""
        return (
            f"run folder {run}, with curves.png; see it at work: gld-zoo draw {run}/last IMAGE... "
            "--out FOLDER"
        )

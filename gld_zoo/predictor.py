"""What a pretrained model sees in images, as a whole and cell by cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)

from gld_zoo.distillation.heads import global_local_logits
from gld_zoo.distillation.maps import feature_map, global_local_features
from gld_zoo.distillation.teacher import HEAD_FILE, LinearHead, Teacher, side_of, take_size
from gld_zoo.explain import explain, seen_part
from gld_zoo.hub import create_model, is_of_timm
from gld_zoo.output import CommandError


def create_predictor(name: str) -> Predictor:
    """Return a model by its name, or a run's teacher by the name of the head fitted to it.

    Raises:
        CommandError: If it cannot be had.
    """
    return TeacherOfRun(name) if Path(name).name == HEAD_FILE else Predictor(name)


class Predictor:
    """A pretrained model with its preprocessing and class names.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.

    Raises:
        CommandError: If it cannot be created with weights.
    """

    def __init__(self, name: str) -> None:
        try:
            self.model = create_model(name, pretrained=True).eval()
        except ValueError as error:
            raise CommandError(f"--model {name!r} cannot be created: {error}") from error
        self.config = resolve_model_data_config(self.model)
        channels = self.config["input_size"][0]
        if self.model.num_classes < 1 or channels != 3:
            raise CommandError(
                f"--model {name!r} has {self.model.num_classes} classes and takes images of "
                f"{channels} channels; name a classifier of colour images"
            )
        self.transform = create_transform(**self.config)
        self.names = class_names(self.model, name)

    def prepare(self, batch: torch.Tensor) -> torch.Tensor:
        """Return transformed images `[B, 3, H, W]` as the model takes them."""
        return batch

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, K]` of transformed images."""
        return self.model(batch)

    def rows(self, batch: torch.Tensor, grid: int) -> torch.Tensor:
        """Return the logits `[B, 1+L, K]` of transformed images and of their cells.

        Raises:
            ValueError: If the model has no local logits.
        """
        return global_local_logits(self.model, batch, grid)

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image], top: int) -> list[list[tuple[str, float]]]:
        """Return, for each image, the `top` most probable classes and their probabilities."""
        batch = torch.stack([self.transform(image) for image in images])
        best = self.logits(batch).softmax(1).topk(min(top, len(self.names)))
        return [
            [(self.names[i], p) for i, p in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def explain(self, image: Image.Image, grid: int) -> Image.Image:
        """Draw what each cell of an image is taken for, and the activation map.

        Raises:
            CommandError: If the model has no local logits.
        """
        batch = self.transform(image)[None]
        try:
            rows = self.rows(batch, grid)[0].softmax(1)
        except ValueError as error:
            raise CommandError(str(error)) from error
        activation = feature_map(self.model, self.prepare(batch)).values[0].amax(0)
        best = rows.max(1)
        labels = [
            f"{self.names[i]} {p:.0%}"
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return explain(seen_part(image, self.config), labels, activation)


class TeacherOfRun(Predictor):
    """A run's teacher with the head that was fitted to it, which sees what its student sees.

    Args:
        name: The file of that head, `RUN/teacher_head.safetensors`.

    Raises:
        CommandError: If the run, its teacher or the head cannot be read.
    """

    def __init__(self, name: str) -> None:
        run = Path(name).parent
        super().__init__(str(run))  # the student, whose images and classes they are
        try:
            recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
            head = LinearHead(**load_file(name))
            model = create_model(recipe["teacher"], pretrained=True).eval()
        except (OSError, SafetensorError, TypeError, ValueError, KeyError) as error:
            raise CommandError(f"--model {name!r} cannot be created: {error}") from error
        size = side_of(model, recipe.get("teacher_size"))
        take_size(model, size or self.config["input_size"][-1])
        mean, std = self.config["mean"], self.config["std"]
        self.teacher = Teacher(model, None, mean, std, size=size, head="fit")
        self.teacher.set_head(head)
        self.model = self.teacher.model

    def prepare(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the student's images as the teacher takes them."""
        return self.teacher.prepare(batch)

    def logits(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the logits `[B, K]` of transformed images."""
        return self.rows(batch, 1)[:, 0]

    def rows(self, batch: torch.Tensor, grid: int) -> torch.Tensor:
        """Return the logits `[B, 1+L, K]` of transformed images and of their cells.

        Raises:
            ValueError: If the teacher has no such map.
        """
        features = global_local_features(self.model, self.prepare(batch), grid)
        return self.teacher.classify_rows(features)


def class_names(model: Any, name: str) -> list[str]:
    """Return a model's class names: its cfg's, ImageNet's where timm has it of that, or numbers.

    Args:
        model: timm's, in whose cfg they may be.
        name: By which it was created.
    """
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        return list(names)
    known = name.startswith("hf-hub:timm/") or is_of_timm(name)
    subset = infer_imagenet_subset(model) if known else None  # by the number of classes
    if subset is None:
        return [f"class {i}" for i in range(model.num_classes)]
    info = ImageNetInfo(subset)
    words = [synonyms.partition(",")[0] for synonyms in info.label_descriptions()]
    counts = Counter(words)  # a crane is a bird and a machine
    defined = info.label_descriptions(detailed=True)
    return [one if counts[one] == 1 else full for one, full in zip(words, defined, strict=True)]

"""What a pretrained model sees in images, as a whole and cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from gld_zoo.distillation.heads import global_local_logits
from gld_zoo.distillation.maps import feature_map
from gld_zoo.explain import explain, seen_part
from gld_zoo.hub import create_model
from gld_zoo.output import CommandError


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
        self.names = class_names(self.model)

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image], top: int) -> list[list[tuple[str, float]]]:
        """Return, for each image, the `top` most probable classes and their probabilities."""
        batch = torch.stack([self.transform(image) for image in images])
        best = self.model(batch).softmax(1).topk(min(top, len(self.names)))
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
            rows = global_local_logits(self.model, batch, grid)[0].softmax(1)
        except ValueError as error:
            raise CommandError(str(error)) from error
        activation = feature_map(self.model, batch).values[0].amax(0)
        best = rows.max(1)
        labels = [
            f"{self.names[i]} {p:.0%}"
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return explain(seen_part(image, self.config), labels, activation)


def class_names(model: Any) -> list[str]:
    """Return a model's class names: its cfg's, or numbers."""
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        return list(names)
    return [f"class {i}" for i in range(model.num_classes)]

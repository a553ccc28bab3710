"""Students and teachers by name, how they are trained, and what a student's images look like."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save
from timm.data import resolve_model_data_config

from gld_zoo import GlobalLocal
from gld_zoo.folding import fold_batch_norm
from gld_zoo.heads import classifiers
from gld_zoo.hub import create_model


class ModelError(ValueError):
    """A model does not fit the recipe; the message names it and the remedy."""


def create_student(
    name: str, label_names: Sequence[str], device: torch.device, *, finetune: str | None = None
) -> nn.Module:
    """Build a student, in channels-last layout.

    Args:
        name: timm's.
        label_names: The dataset's classes.
        device: Where it trains.
        finetune: None draws random weights; 'all' and 'classifier' start from pretrained ones, the
            latter with all but the classifier frozen.

    Raises:
        ModelError: If timm does not know the name, or weights are asked for and there are none.
    """
    pretrained, classes = finetune is not None, len(label_names)
    student: Any = _create("student", name, device, num_classes=classes, pretrained=pretrained)
    if pretrained and _names_of(student, label_names) not in (None, list(label_names)):
        student.reset_classifier(classes)
    if finetune == "classifier":
        student.requires_grad_(False)
        for part in classifiers(student):
            part.requires_grad_(True)
    return student


def set_training_mode(student: nn.Module, finetune: str | None) -> None:
    """Set a student to training; a frozen backbone stays in eval mode, statistics included."""
    if finetune == "classifier":
        student.eval()
        for part in classifiers(student):
            part.train()
    else:
        student.train()


def create_frozen(name: str, device: torch.device, *, role: str = "model") -> nn.Module:
    """Build a pretrained model in eval mode, frozen, in channels-last layout.

    Args:
        name: timm's.
        device: Where it runs.
        role: What errors call it.

    Raises:
        ModelError: If timm does not know the name or it has no weights.
    """
    return _create(role, name, device, pretrained=True).eval().requires_grad_(False)


def create_teacher(
    name: str, label_names: Sequence[str], device: torch.device, *, role: str = "teacher"
) -> nn.Module:
    """Build a frozen model, as `create_frozen` does, that has a dataset's classes.

    Args:
        name: timm's.
        label_names: The dataset's classes.
        device: Where it runs.
        role: What errors call it.

    Raises:
        ModelError: If timm does not know the name, it has no weights or not the dataset's classes,
            or has them in another order, where it tells their names.
    """
    teacher: Any = create_frozen(name, device, role=role)
    classes, names = len(label_names), _names_of(teacher, label_names)
    if teacher.num_classes != classes:
        raise ModelError(
            f"{role} {name!r} has {teacher.num_classes} classes and the dataset {classes}; "
            "use one trained on this dataset (teacher: null trains one, local-dir:RUN/last is it)"
        )
    if names and names != list(label_names) and sorted(names) == sorted(label_names):
        place = next(i for i, name in enumerate(names) if name != label_names[i])
        raise ModelError(
            f"{role} {name!r} has the dataset's classes in another order: class {place} is "
            f"{names[place]!r} to it and {label_names[place]!r} to the dataset; give the dataset "
            "its order, or train it on this one"
        )
    return teacher


def _names_of(model: Any, label_names: Sequence[str]) -> list[str] | None:
    """Return a model's class names; None if it, or the dataset, tells only numbers."""
    names = model.pretrained_cfg.get("label_names")
    if not names or all(name.isdigit() for name in label_names):
        return None
    return list(names)


def weights_sha256(model: nn.Module) -> str:
    """Return the hash of the file that `save_pretrained` writes of a model's weights."""
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    return hashlib.sha256(save(tensors, metadata={"format": "pt"})).hexdigest()


def _create(role: str, name: str, device: torch.device, **kwargs: Any) -> Any:
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not (folder / "config.json").is_file():
        raise ModelError(
            f"{role}={name!r}: {folder} holds no model (config.json and model.safetensors); train "
            "it first, or name another"
        )
    try:
        model = create_model(name, **kwargs)
    except ValueError as error:
        raise ModelError(f"{role}={name!r} cannot be created: {error}") from error
    if model.in_chans != 3:
        raise ModelError(f"{role}={name!r} takes {model.in_chans} channels; the trainer gives RGB")
    return model.to(device, memory_format=torch.channels_last)


def resolve_data_config(
    student: nn.Module, image_size: int | None, crop_pct: float = 1.0
) -> dict[str, Any]:
    """Return how the student's images are prepared: square, with its cfg's mean and std."""
    config = resolve_model_data_config(student)
    size = image_size or config["input_size"][-1]
    config.update(
        input_size=(config["input_size"][0], size, size), crop_pct=crop_pct, crop_mode="center"
    )
    return config


class GlobalOnly(nn.Module):
    """Wrap a model trained on labels alone: `[B, K]`, its head in float32 under autocast.

    The counterpart of `GlobalLocal`, with the same precision, so that a baseline and a student are
    trained alike. The trainer wraps either, never the model itself: Accelerate patches what it is
    given, and the model must stay what evaluation and export see.

    Args:
        model: Any timm model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K]`."""
        model: Any = self.model
        features, dtype = model.forward_features(images), next(model.parameters()).dtype
        with torch.autocast(images.device.type, enabled=False):
            if isinstance(features, (list, tuple)):  # of several branches
                return model.forward_head([part.to(dtype) for part in features])
            return model.forward_head(features.to(dtype))


class Teacher(nn.Module):
    """A frozen teacher: the student's images to global and local logits `[B, 1+L, K]`.

    The images are renormalised from the student's mean and std to the teacher's own. Batch norm is
    folded into the convolutions before it where the model is one of this package's.

    Args:
        model: The teacher, in eval mode.
        grid: Cells along each side of its feature map.
        mean, std: With which the images were normalised.
    """

    def __init__(
        self, model: nn.Module, grid: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        folded = fold_batch_norm(model).to(memory_format=torch.channels_last)
        self.logits = GlobalLocal(folded, grid)
        config = resolve_model_data_config(model)
        device = next(model.parameters()).device
        statistics = (config["mean"], config["std"], mean, std)
        own_mean, own_std, their_mean, their_std = torch.tensor(statistics, device=device)[
            ..., None, None
        ]
        self.same = torch.equal(own_mean, their_mean) and torch.equal(own_std, their_std)
        self.scale = nn.Buffer(their_std / own_std, persistent=False)
        self.shift = nn.Buffer((their_mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images to the teacher's logits `[B, K]`."""
        return self.logits.model(self.renormalize(images))

    def renormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's normalised images to the teacher's."""
        return images if self.same else torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images `[B, 3, H, W]` to the teacher's logits."""
        return self.logits(self.renormalize(images))

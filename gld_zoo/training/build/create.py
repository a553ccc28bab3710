"""Models by name, to train or to measure: what they refuse, see, and are wrapped in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg

from gld_zoo.distillation.heads import classifiers
from gld_zoo.hub import create_model
from gld_zoo.training.build.class_names import check_class_names, names_of
from gld_zoo.training.common.errors import ModelError


def create_student(
    name: str,
    label_names: Sequence[str],
    device: torch.device,
    *,
    finetune: str | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a student, in channels-last layout.

    Args:
        name: timm's.
        label_names: The dataset's classes; without any it is a backbone.
        device: Where it trains.
        finetune: None draws random weights; 'all' and 'classifier' start from pretrained ones, the
            latter with all but the classifier frozen.
        options: What else timm is to build it with.

    Raises:
        ModelError: If timm does not know the name or an option, or weights are asked for and there
            are none.
    """
    classes, options = len(label_names), options or {}
    if finetune == "classifier" and not classes:
        raise ModelError("finetune=classifier has none to train without classes; use finetune: all")
    if taken := {"num_classes", "pretrained", "in_chans", "features_only"} & set(options):
        raise ModelError(f"student_args: {', '.join(sorted(taken))} is the trainer's; leave it out")
    if finetune is None:
        return _create("student", name, device, num_classes=classes, **options)
    # with its own classes first: for others timm overlooks weights that are missing
    student: Any = _create("student", name, device, pretrained=True, **options)
    its_names = names_of(student, label_names)
    if student.num_classes != classes or its_names not in (None, list(label_names)):
        student.reset_classifier(classes)
        student.to(device)
    if finetune == "classifier":
        student.requires_grad_(False)
        for part in classifiers(student):
            part.requires_grad_(True)
    return student


def enable_grad_checkpointing(model: Any, name: str) -> None:
    """Let a model forget its inner maps until its backward pass.

    Raises:
        ModelError: If it cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise ModelError(
            f"student {name!r} has no grad_checkpointing; choose a smaller batch_size instead"
        ) from error


def set_training_mode(student: nn.Module, finetune: str | None) -> None:
    """Set a student to training; a frozen backbone stays in eval mode, statistics included."""
    if finetune == "classifier":
        student.eval()
        for part in classifiers(student):
            part.train()
    else:
        student.train()


def create_frozen(
    name: str,
    device: torch.device,
    *,
    label_names: Sequence[str] | None = None,
    role: str = "model",
) -> nn.Module:
    """Build a pretrained model in eval mode, frozen, in channels-last layout.

    Args:
        name: timm's.
        device: Where it runs.
        label_names: Classes of a dataset, which must be the model's; None takes it as it is.
        role: What errors call it.

    Raises:
        ModelError: If timm does not know the name, it has no weights or not the dataset's classes,
            or has them or some of them in another order, where it tells their names.
    """
    model: Any = _create(role, name, device, pretrained=True).eval().requires_grad_(False)
    if label_names is None:
        return model
    check_class_names(model, label_names, f"{role} {name!r}")
    return model


def weights_sha256(model: nn.Module) -> str:
    """Return the hash of the file that `save_pretrained` writes of a model's weights."""
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    return hashlib.sha256(save(tensors, metadata={"format": "pt"})).hexdigest()


def structure_sha256(model: nn.Module, weights: str) -> str:
    """Return the hash of a model's layers, as they describe themselves, and of its weights' hash.

    The same weights fit models of other paddings or activations.
    """
    described = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # of functions, another each time
    return hashlib.sha256((type(model).__module__ + described + weights).encode()).hexdigest()


def _create(role: str, name: str, device: torch.device, **kwargs: Any) -> Any:
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not (folder / "config.json").is_file():
        raise ModelError(
            f"{role}={name!r}: {folder} holds no model (config.json and model.safetensors); train "
            "it first, or name another"
        )
    try:
        model = create_model(name, **kwargs)
    except (AssertionError, TypeError, ValueError) as error:  # of arguments that it does not take
        reason = str(error) or "it does not take the value of an option of its own"
        raise ModelError(f"{role}={name!r} cannot be created: {reason}") from error
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


def tagged(name: str) -> str:
    """Return a timm name with the tag of its weights, which timm takes where none is given."""
    cfg = None if ":" in name or "." in name else get_pretrained_cfg(name, allow_unregistered=True)
    return f"{name}.{cfg.tag}" if cfg and cfg.tag else name

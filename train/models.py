"""Models by name, to train or to measure: what they refuse, see, and are wrapped in."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.layers import Conv2dSame

from gld_zoo import GlobalLocal
from gld_zoo.folding import fold_batch_norm
from gld_zoo.heads import Grid, classifiers
from gld_zoo.hub import create_model


class ModelError(ValueError):
    """A model does not fit the recipe; the message names it and the remedy."""


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
        label_names: The dataset's classes.
        device: Where it trains.
        finetune: None draws random weights; 'all' and 'classifier' start from pretrained ones, the
            latter with all but the classifier frozen.
        options: What else timm is to build it with.

    Raises:
        ModelError: If timm does not know the name or an option, or weights are asked for and there
            are none.
    """
    classes, options = len(label_names), options or {}
    if taken := {"num_classes", "pretrained", "in_chans"} & set(options):
        raise ModelError(f"student_args: {', '.join(sorted(taken))} is the trainer's; leave it out")
    if finetune is None:
        return _create("student", name, device, num_classes=classes, **options)
    # with its own classes first: for others timm overlooks weights that are missing
    student: Any = _create("student", name, device, pretrained=True, **options)
    its_names = _names_of(student, label_names)
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
    classes, names = len(label_names), _names_of(model, label_names)
    if model.num_classes != classes:
        raise ModelError(
            f"{role} {name!r} has {model.num_classes} classes and the dataset {classes}; "
            "use one trained on this dataset (teacher: null trains one, local-dir:RUN/last is it)"
        )
    if names and names != list(label_names) and sorted(names) == sorted(label_names):
        place = next(i for i, name in enumerate(names) if name != label_names[i])
        raise ModelError(
            f"{role} {name!r} has the dataset's classes in another order: class {place} is "
            f"{names[place]!r} to it and {label_names[place]!r} to the dataset; give the dataset "
            "its order, or train it on this one"
        )
    if names and (moved := _moved(names, label_names)):
        here, there = moved
        raise ModelError(
            f"{role} {name!r} has some of the dataset's classes at other places: class {here} is "
            f"{names[here]!r} to it, and class {there} {label_names[there]!r} to the dataset; give "
            "the dataset its classes and their order, or train it on this one"
        )
    return model


def _moved(names: Sequence[str], label_names: Sequence[str]) -> tuple[int, int] | None:
    """Return the places of a class that a model and a dataset both know, if they differ.

    Spelling does not make another class; numbers are no names. A name can stand for several
    classes, as ImageNet's 'crane' does.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(label_names):
        places.setdefault(_plain(name), []).append(place)
    for place, name in enumerate(names):
        theirs = places.get(_plain(name), [place])
        if place not in theirs and not name.isdigit():
            return place, theirs[0]
    return None


def _plain(name: str) -> str:
    return "".join(name.casefold().replace("_", "").replace("-", "").split())


def _names_of(model: Any, label_names: Sequence[str]) -> list[str] | None:
    """Return a model's class names; None if it has none, or if only the dataset's are numbers."""
    names = list(model.pretrained_cfg.get("label_names") or [])
    unnamed = _are_numbers(label_names) and not _are_numbers(names)
    return None if not names or unnamed else names


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdigit() for name in names)


@contextlib.contextmanager
def refusals(name: str, size: int) -> Iterator[None]:
    """Without gradients, turn what a model refuses of square images into a `ModelError`.

    Args:
        name: What the error calls the model.
        size: Side of the images in pixels.

    Raises:
        ModelError: If it refuses.
    """
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError:  # which is no fault of the size
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{name} cannot take {size}x{size} images: {error}; choose another, or another "
            "image_size"
        ) from error


def check_lone_image(
    network: nn.Module, image: torch.Tensor, *, name: str, batch_size: int, processes: int
) -> None:
    """Refuse a module that cannot train on one image, as batch norm cannot on a map of 1x1.

    A copy is shown it, and what that draws is taken back, so that nothing of the run moves.

    Args:
        network: In the mode in which it trains.
        image: One, `[1, 3, H, W]`.
        name: What the error calls it.
        batch_size: Of all processes.
        processes: How many there are.

    Raises:
        ModelError: If it refuses.
    """
    devices = [image.device] if image.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            copy.deepcopy(network)(image)
    except ValueError as error:
        height, width = image.shape[-2:]
        raise ModelError(
            f"batch_size={batch_size} leaves a process one image, on which {name} cannot train at "
            f"{width}x{height} ({error}), as batch norm needs two values a channel; use "
            f"batch_size={2 * processes} or more"
        ) from error


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
    except (TypeError, ValueError) as error:  # the former of an argument that it does not take
        raise ModelError(f"{role}={name!r} cannot be created: {error}") from error
    if model.in_chans != 3:
        raise ModelError(f"{role}={name!r} takes {model.in_chans} channels; the trainer gives RGB")
    return model.to(device, memory_format=torch.channels_last)


def forbid_tf32() -> None:
    """Let float32 be float32 on a GPU too; bf16 is the fast precision."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def measuring_device() -> torch.device:
    """Return the GPU, without TF32, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    forbid_tf32()
    return torch.device("cuda")


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
    """A frozen teacher: the student's images to its logits.

    The images are renormalised from the student's mean and std to the teacher's own. Batch norm is
    folded into the convolutions before it where the model is one of this package's.

    Args:
        model: The teacher, in eval mode.
        grid: Cells along each side of its feature map, or several such numbers; None for a model
            that is to `classify` alone, which then need not have local logits.
        mean, std: With which the images were normalised.
    """

    def __init__(
        self, model: nn.Module, grid: Grid | None, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = fold_batch_norm(model).to(memory_format=torch.channels_last)
        self.logits = self.model if grid is None else GlobalLocal(self.model, grid)
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
    def keep_in(self, dtype: torch.dtype | None) -> None:
        """Keep the weights that autocast would cast at each step in its type, to the same bits.

        They are those of convolutions and linear layers before the head, which is in float32. From
        here on the teacher runs under autocast alone.

        Args:
            dtype: Autocast's; None changes nothing.
        """
        if dtype is None:
            return
        model: Any = self.model
        width = model.num_features
        in_head: set[nn.Module] = set()

        def note(module: nn.Module, *_: Any) -> None:
            in_head.add(module)

        hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
        parameter = next(model.parameters())
        model.forward_head(parameter.new_zeros(1, width, 1, 1))
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            # those alone that multiply by their weight as it is
            if type(module) in (nn.Conv2d, Conv2dSame, nn.Linear) and module not in in_head:
                module.to(dtype)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images to the teacher's logits `[B, K]`."""
        return self.model(self.renormalize(images))

    def renormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's normalised images to the teacher's."""
        return images if self.same else torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images `[B, 3, H, W]` to logits `[B, 1+L, K]`, the local ones last."""
        return self.logits(self.renormalize(images))

"""A recipe's student, teacher and what the trainer wraps, ready for their device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import torch.nn as nn
from accelerate import Accelerator

from gld_zoo.distillation.folding import fold_batch_norm
from gld_zoo.distillation.heads import FeaturesAndLogits, GlobalLocal
from gld_zoo.distillation.teacher import Teacher, side_of, take_size
from gld_zoo.training.build.class_names import match_classes
from gld_zoo.training.build.create import (
    GlobalOnly,
    create_frozen,
    create_student,
    enable_grad_checkpointing,
    resolve_data_config,
    set_training_mode,
    structure_sha256,
    weights_sha256,
)
from gld_zoo.training.build.refusals import check_lone_image, refusals
from gld_zoo.training.build.small_maps import multiply_on_small_maps
from gld_zoo.training.build.sync_batch_norm import synchronise_batch_norm
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import derive_seed


class Models(NamedTuple):
    """The student, the frozen teacher if any, and the module to wrap for data parallelism.

    `config` is timm's data config of the student, `teacher_sha256` the hash of the teacher's
    weights, `teacher_identity` that of the layers which compute with them too.
    """

    student: nn.Module
    teacher: Teacher | None
    network: nn.Module
    config: dict[str, Any]
    teacher_sha256: str | None
    teacher_identity: str | None = None


def build_models(recipe: Recipe, label_names: Sequence[str], accelerator: Accelerator) -> Models:
    """Build a recipe's models on a device, the student's weights drawn by the recipe's seed.

    Raises:
        ModelError: If one cannot be built, or they do not take the recipe's images.
    """
    device = accelerator.device
    torch.manual_seed(derive_seed(recipe.seed))
    student = create_student(
        recipe.student,
        label_names,
        device,
        finetune=recipe.finetune,
        options=recipe.student_args,
    )
    if device.type == "cpu":
        student = multiply_on_small_maps(student)
    if recipe.grad_checkpointing:
        enable_grad_checkpointing(student, recipe.student)
    if recipe.sync_batch_norm and accelerator.num_processes > 1:
        student = synchronise_batch_norm(student, device)
    config = resolve_data_config(student, recipe.image_size, recipe.crop_pct)
    # both are shown two images: what they refuse is refused before the first epoch
    images = torch.zeros((2, *config["input_size"]), device=device)
    size = images.shape[-1]
    with refusals(f"student {recipe.student!r}", size):
        network = _wrap(student, recipe).eval()
        network(images)
    _check_batch(recipe, network, images[:1], accelerator.num_processes)
    teacher, sha256, identity = None, None, None
    if recipe.teacher:
        teacher, sha256, identity = _build_teacher(recipe, label_names, config, images)
    if recipe.compile:
        # CUDA graphs: small models are bound by the launches of their kernels
        mode = "reduce-overhead" if device.type == "cuda" else None
        if hasattr(torch._inductor.config, "deterministic"):
            torch._inductor.config.deterministic = True
        network.compile(mode=mode)
        if teacher:
            teacher.compile(mode=mode)
    return Models(student, teacher, network, config, sha256, identity)


def _wrap(student: nn.Module, recipe: Recipe) -> nn.Module:
    """Return the module around a student that gives the loss what it needs."""
    if not recipe.teacher:
        return GlobalOnly(student)
    wrapper = FeaturesAndLogits if recipe.teaches_relations else GlobalLocal
    return wrapper(student, recipe.grid)


def _build_teacher(
    recipe: Recipe, label_names: Sequence[str], config: dict[str, Any], images: torch.Tensor
) -> tuple[Teacher, str, str]:
    """Return a recipe's teacher, which takes the student's images, and hashes of what it is."""
    title = f"teacher {recipe.teacher!r}"
    model: Any = create_frozen(str(recipe.teacher), images.device, role="teacher")
    sha256 = weights_sha256(model)  # before its batch norm is folded
    identity = structure_sha256(model, sha256)
    own = recipe.teacher_head == "own"
    columns = match_classes(model, label_names, title) if own else None
    size = side_of(model, recipe.teacher_size)
    seen = size or images.shape[-1]
    take_size(model, seen)
    remedy = "choose another, or another teacher_size (own is its own)"
    with refusals(title, seen, remedy):
        teacher = Teacher(
            fold_batch_norm(model, (images.shape[1], seen, seen)),
            recipe.grid,
            config["mean"],
            config["std"],
            size=size,
            head=recipe.teacher_head,
            columns=columns,
        )
        rows = teacher.features(images)
        if own:
            teacher.classify_rows(rows)
    return teacher, sha256, identity


def _check_batch(recipe: Recipe, network: nn.Module, image: torch.Tensor, processes: int) -> None:
    """Refuse a batch of which a process gets one image that the student cannot train on.

    Of several processes, a synchronised batch norm sees the images of all.
    """
    if recipe.batch_size // processes != 1 or (recipe.sync_batch_norm and processes > 1):
        return
    student: Any = network
    network.train()
    set_training_mode(student.model, recipe.finetune)
    check_lone_image(
        network,
        image,
        name=f"student {recipe.student!r}",
        batch_size=recipe.batch_size,
        processes=processes,
    )
    network.eval()

"""Distil a student from a teacher; without a teacher, train on the labels alone (a teacher, a baseline).

    accelerate launch train/distill.py --config train/recipes/quickstart.yaml
    accelerate launch --mixed_precision bf16 train/distill.py --config train/recipes/X.yaml --seed 1
    accelerate launch --num_processes 4 train/distill.py --config train/recipes/X.yaml --resume

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from timm.task import ClassificationEvaluator
from tqdm.auto import tqdm

from checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from gld_zoo import GLDLoss, GlobalLocal
from gld_zoo.hub import save_pretrained
from loaders import DataError, ImageSource, Split, TrainBatches, derive_seed, eval_batches
from models import ModelError, Teacher, create_student, create_teacher, resolve_data_config
from recipe import Recipe, parse_command
from run_folder import RunError, RunFolder

CHECK_EVERY = 20  # steps between reads of the loss from the device


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number; the message gives its terms and the step."""


def main(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """Run a recipe in a folder: data, models, optimiser, resume, loop, export."""
    accelerator = Accelerator()
    run = RunFolder(folder, recipe, resume=resume)
    if run.finished:
        accelerator.print(f"{folder} holds a finished run; nothing to resume")
        return

    source = ImageSource(
        recipe.dataset,
        train_split=recipe.train_split,
        test_split=recipe.test_split,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )
    num_classes = len(source.label_names)
    torch.manual_seed(derive_seed(recipe.seed))
    student = create_student(recipe.student, num_classes, accelerator.device)
    config = resolve_data_config(student, recipe.image_size)
    teacher = None
    if recipe.teacher:
        model = create_teacher(recipe.teacher, num_classes, accelerator.device)
        teacher = Teacher(model, recipe.grid, config["mean"], config["std"])
    train, test = (
        split.to(accelerator.device) for split in source.decode(config["input_size"][-1], config["interpolation"])
    )
    batches = TrainBatches(
        train,
        config["mean"],
        config["std"],
        batch_size=recipe.batch_size,
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )

    network = GlobalLocal(student, recipe.grid) if teacher else student
    criterion = GLDLoss(recipe.alpha, recipe.beta, local_weight=recipe.local_weight, global_batch=True)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    check_fit(network, teacher, batches)
    if recipe.compile:
        network.compile()
        if teacher:
            teacher.compile()
    network, optimizer = accelerator.prepare(network, optimizer)

    def measure(predict: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return evaluate(predict, test, config, recipe.eval_batch_size, accelerator)

    if accelerator.is_main_process:
        run.start(accelerator)
    accelerator.print(f"{recipe.dataset}: {len(train.labels):,} training and {len(test.labels):,} test images")
    teacher_top1 = None
    if teacher:
        teacher_top1 = measure(teacher.classify)["top1"]
        accelerator.print(f"teacher {recipe.teacher}: top-1 {teacher_top1:.2f} %")
    start = restore(run, student, optimizer, accelerator) if resume else 0
    before = measure(student.eval())["top1"]
    accelerator.print(f"student {recipe.student}: top-1 {before:.2f} % after {start} epochs")

    for epoch in range(start, recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch)
        torch.manual_seed(derive_seed(recipe.seed, epoch, accelerator.process_index))  # dropout, stochastic depth
        began = time.perf_counter()
        trained = train_one_epoch(network, teacher, criterion, optimizer, batches, epoch, accelerator)
        seconds = time.perf_counter() - began
        tested = measure(student.eval())
        line = dict(
            epoch=epoch + 1,
            lr=recipe.lr_at(epoch),
            **trained,
            **{f"test_{name}": value for name, value in tested.items()},
            images_per_second=round(len(batches) * recipe.batch_size / seconds, 1),
            seconds=round(time.perf_counter() - began, 2),
        )
        accelerator.print(describe(line, recipe.epochs))
        if accelerator.is_main_process:
            run.log(line)
            save_checkpoint(
                run.checkpoints,
                f"epoch-{epoch + 1:05d}",
                dict(model=student.state_dict(), optimizer=optimizer_tensors(optimizer)),
                dict(epoch=epoch + 1, step=0),
                keep=recipe.keep_checkpoints,
            )

    if accelerator.is_main_process:
        save_pretrained(student, folder / "last", label_names=source.label_names, data_config=config)
        run.write_json("summary.json", summarize(run.history, teacher_top1))
    accelerator.wait_for_everyone()
    last = run.history[-1] if run.history else {}
    if teacher_top1 is not None:
        accelerator.print(f"teacher {teacher_top1:.2f} %")
    accelerator.print(f"student {before:.2f} % before, {last.get('test_top1', before):.2f} % after")
    accelerator.print(f"run folder {folder}; load the student by timm.create_model('local-dir:{folder}/last', pretrained=True)")


def check_fit(network: nn.Module, teacher: Teacher | None, batches: TrainBatches) -> None:
    """Let both models see two images, so that what they refuse is refused before the first epoch."""
    size = batches.size
    images = torch.zeros((2, 3, size, size), device=batches.images.device)
    with torch.no_grad():
        network.eval()(images)
        if teacher:
            teacher(images)


def restore(run: RunFolder, student: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> int:
    """Load the newest undamaged checkpoint into student and optimiser and return the epochs it has seen."""
    for path in reversed(list_checkpoints(run.checkpoints)):
        try:
            tensors, state = load_checkpoint(path)
        except CheckpointError as error:
            accelerator.print(f"{error}; trying the one before")
            continue
        student.load_state_dict(tensors["model"])
        load_optimizer_tensors(optimizer, tensors["optimizer"])
        run.rewind(state["epoch"])
        accelerator.print(f"resuming after epoch {state['epoch']}")
        return state["epoch"]
    accelerator.print(f"{run.path} holds no usable checkpoint; starting anew")
    return 0


def train_one_epoch(
    network: nn.Module,
    teacher: Teacher | None,
    criterion: GLDLoss,
    optimizer: torch.optim.Optimizer,
    batches: TrainBatches,
    epoch: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Train for one epoch and return the mean of each loss term and the training top-1 and top-5."""
    network.train()
    evaluator = ClassificationEvaluator(accelerator.device)
    log: list[torch.Tensor] = []
    names: list[str] = []
    hidden = None if accelerator.is_local_main_process else True  # None hides it where nobody watches
    bar = tqdm(batches.epoch(epoch), desc=f"epoch {epoch + 1}", total=len(batches), leave=False, disable=hidden)
    for step, (images, target) in enumerate(bar):
        logits, terms = forward(network, teacher, criterion, images, target, accelerator)
        accelerator.backward(terms["loss"])
        optimizer.step()
        optimizer.zero_grad()
        names = list(terms)
        log.append(torch.stack([term.detach() for term in terms.values()]))
        evaluator.update(logits, target)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(batches):
            check_finite(log[-CHECK_EVERY:], names, epoch, step)
            bar.set_postfix(top1=f"{evaluator.summary()['top1']:.1f}", loss=f"{log[-1][0].item():.3f}")
    means = accelerator.reduce(torch.stack(log).mean(0), "mean").tolist()
    scores = evaluator.compute(distributed=accelerator.num_processes > 1)
    return dict(zip(names, means, strict=True), train_top1=scores["top1"], train_top5=scores["top5"])


def forward(
    network: nn.Module,
    teacher: Teacher | None,
    criterion: GLDLoss,
    images: torch.Tensor,
    target: torch.Tensor,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the student's global logits `[B, K]` and the loss with its terms."""
    logits = network(images)
    if teacher is None:
        loss = F.cross_entropy(logits.float(), target)
        return logits, dict(loss=loss, loss_ce=loss)
    with accelerator.autocast():
        teacher_logits = teacher(images)
    return logits[:, 0], criterion(logits, teacher_logits, target)


def check_finite(log: list[torch.Tensor], names: list[str], epoch: int, step: int) -> None:
    """Stop at the first of the last steps whose loss is not finite."""
    for back, values in enumerate(reversed(log)):
        rows = values.tolist()
        if not all(map(math.isfinite, rows)) and (back + 1 == len(log) or torch.stack(log[: -back - 1]).isfinite().all()):
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, rows, strict=True))
            raise NonFiniteLossError(f"the loss is not finite at step {step + 1 - back} of epoch {epoch + 1}: {terms}")


@torch.no_grad()
def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    config: dict[str, Any],
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return loss, top-1 and top-5 over a split, in float32 whatever the training precision."""
    evaluator = ClassificationEvaluator(accelerator.device)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    for images, target in eval_batches(
        split, config["mean"], config["std"], batch_size=batch_size, rank=rank, world_size=world_size
    ):
        evaluator.update(predict(images), target)
    return dict(evaluator.compute(distributed=world_size > 1))


def describe(line: dict[str, Any], epochs: int) -> str:
    """Return an epoch's metrics as one line."""
    terms = " ".join(f"{name.removeprefix('loss_')} {line[name]:.3f}" for name in line if name.startswith("loss"))
    left = line["seconds"] * (epochs - line["epoch"])
    return (
        f"epoch {line['epoch']}/{epochs}  test top-1 {line['test_top1']:.2f}  train top-1 {line['train_top1']:.2f}  "
        f"{terms}  lr {line['lr']:g}  {line['images_per_second']:.0f} images/s  {left / 60:.0f} min left"
    )


def summarize(history: list[dict[str, Any]], teacher_top1: float | None) -> dict[str, Any]:
    """Return the last epoch's scores, and the best epoch as a footnote."""
    best = max(history, key=lambda line: line["test_top1"])
    last = history[-1]
    return dict(
        epochs=last["epoch"],
        top1=last["test_top1"],
        top5=last["test_top5"],
        teacher_top1=teacher_top1,
        best_epoch=best["epoch"],
        best_epoch_top1=best["test_top1"],
        seconds=round(sum(line["seconds"] for line in history), 1),
    )


if __name__ == "__main__":
    command = parse_command(__doc__.splitlines()[0])
    try:
        main(command.recipe, command.run, resume=command.resume)
    except (DataError, ModelError, NonFiniteLossError, RunError) as error:
        sys.exit(f"error: {error}")

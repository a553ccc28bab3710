"""Distil a student from a teacher; without one, train on labels alone (a teacher, a baseline).

    accelerate launch --cpu train/distill.py --config train/recipes/quickstart.yaml
    accelerate launch --mixed_precision bf16 train/distill.py --config FILE --seed 1
    accelerate launch --num_processes 4 train/distill.py --config FILE --resume
    torchrun --nproc_per_node 2 -- train/distill.py --config FILE --run DIR  # two CPU processes

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
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
from loaders import DataError, ImageSource, TrainBatches, derive_seed, eval_batches
from models import (
    GlobalOnly,
    ModelError,
    Teacher,
    create_student,
    create_teacher,
    resolve_data_config,
)
from recipe import Recipe, parse_command
from run_folder import RunError, RunFolder

CHECK_EVERY = 20  # steps between reads of the loss from the device


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number; the message gives its terms and the step."""


def main(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """Run a recipe in a folder and tell what came of it."""
    accelerator = Accelerator()
    check_accelerator(accelerator)
    say = accelerator.print
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # nobody watches
    run = RunFolder(folder, recipe, resume=resume)
    if run.finished:
        say(f"{folder} holds a finished run; nothing to resume")
        return
    trainer = Trainer(recipe, run, accelerator)
    run.start(accelerator)
    say(
        f"{recipe.dataset}: {len(trainer.batches.labels):,} training and "
        f"{len(trainer.test.labels):,} test images"
    )
    teacher_top1 = trainer.measure_teacher()
    if teacher_top1 is not None:
        say(f"teacher {recipe.teacher}: top-1 {teacher_top1:.2f} %")
    start = trainer.restore() if resume else 0
    before = trainer.measure_student()["top1"]
    origin = f"after {start} epochs" if start else "random weights"
    say(f"student {recipe.student}, {origin}: top-1 {before:.2f} %")
    for epoch in range(start, recipe.epochs):
        say(describe(trainer.run_epoch(epoch), recipe.epochs))
    trainer.finish(teacher_top1)
    if teacher_top1 is not None:
        say(f"teacher {teacher_top1:.2f} %")
    say(
        f"student {before:.2f} % before ({origin}), {trainer.measure_student()['top1']:.2f} % after"
    )
    say(
        f"run folder {folder}, with curves.png; the student: import timm, gld_zoo; "
        f"timm.create_model('local-dir:{folder}/last', pretrained=True)"
    )


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what Accelerate can be configured to and this loop cannot do."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise RunError(
            f"gradient accumulation over {steps} steps is set, but the relation spans a whole "
            "batch and does not add up over parts; set it to 1 and choose batch_size instead"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise RunError(
            f"distributed type {accelerator.distributed_type.value} is not supported; use plain "
            "data parallelism (accelerate config)"
        )


class Trainer:
    """One training loop for students, teachers and baselines.

    Args:
        recipe: The run's options.
        run: Its folder.
        accelerator: Device, precision and processes.

    Raises:
        DataError: If the dataset does not fit the recipe.
        ModelError: If a model does not.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.run = run
        self.accelerator = accelerator
        self.share = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.source = ImageSource(
            recipe.dataset,
            train_split=recipe.train_split,
            test_split=recipe.test_split,
            image_column=recipe.image_column,
            label_column=recipe.label_column,
        )
        self._build_models(len(self.source.label_names))
        self._load_data()
        self._prepare()

    def _build_models(self, num_classes: int) -> None:
        recipe, device = self.recipe, self.accelerator.device
        torch.manual_seed(derive_seed(recipe.seed))
        self.student = create_student(recipe.student, num_classes, device)
        self.config = resolve_data_config(self.student, recipe.image_size)
        self.teacher = None
        if recipe.teacher:
            model = create_teacher(recipe.teacher, num_classes, device)
            self.teacher = Teacher(model, recipe.grid, self.config["mean"], self.config["std"])

    def _load_data(self) -> None:
        recipe, config = self.recipe, self.config
        splits = self.source.decode(config["input_size"][-1], config["interpolation"])
        train, self.test = (split.to(self.accelerator.device) for split in splits)
        self.batches = TrainBatches(
            train,
            config["mean"],
            config["std"],
            batch_size=recipe.batch_size,
            crop_padding=recipe.crop_padding,
            flip=recipe.flip,
            seed=recipe.seed,
            **self.share,
        )

    def _prepare(self) -> None:
        recipe = self.recipe
        self.network = (
            GlobalLocal(self.student, recipe.grid) if self.teacher else GlobalOnly(self.student)
        )
        self.criterion = GLDLoss(
            recipe.alpha, recipe.beta, local_weight=recipe.local_weight, global_batch=True
        )
        optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self._check_models()
        if recipe.compile:
            self.network.compile()
            if self.teacher:
                self.teacher.compile()
        # the loaders and the learning rate stay ours: each process takes its share of a global
        # batch by itself
        self.network, self.optimizer = self.accelerator.prepare(self.network, optimizer)

    @torch.no_grad()
    def _check_models(self) -> None:
        """Show both models two images: what they refuse is refused before the first epoch."""
        images = torch.zeros((2, *self.config["input_size"]), device=self.accelerator.device)
        try:
            self.network.eval()(images)
            if self.teacher:
                self.teacher(images)
        except (ValueError, RuntimeError, AssertionError) as error:
            size = self.config["input_size"][-1]
            raise ModelError(f"the models cannot take {size}x{size} images: {error}") from error

    def restore(self) -> int:
        """Load the newest undamaged checkpoint and return the epochs it has seen."""
        damaged: list[Path] = []
        for path in reversed(list_checkpoints(self.run.checkpoints)):
            try:
                tensors, state = load_checkpoint(path)
            except CheckpointError as error:
                self.accelerator.print(f"{error}; trying the one before")
                damaged.append(path)
                continue
            self.student.load_state_dict(tensors["model"])
            load_optimizer_tensors(self.optimizer, tensors["optimizer"])
            self.run.rewind(state["history"])
            self.run.discard(damaged, self.accelerator)
            return state["epoch"]
        if damaged:
            raise RunError(
                f"no checkpoint in {self.run.checkpoints} is usable; put one back from a copy, or "
                "delete the run folder to start anew"
            )
        self.accelerator.print(f"{self.run.path} holds no checkpoint yet; starting anew")
        return 0

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train and measure an epoch, counted from 0; write its metrics and checkpoint."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch)
        # dropout and stochastic depth go on from here whether or not the run was interrupted before
        torch.manual_seed(derive_seed(recipe.seed, epoch, self.accelerator.process_index))
        began = time.perf_counter()
        trained = self.train_one_epoch(epoch)
        seconds = time.perf_counter() - began
        tested = self.measure_student()
        line = dict(
            epoch=epoch + 1,
            lr=recipe.lr_at(epoch),
            **trained,
            **{f"test_{name}": value for name, value in tested.items()},
            images_per_second=round(len(self.batches) * recipe.batch_size / seconds, 1),
            seconds=round(time.perf_counter() - began, 2),
        )
        if self.accelerator.is_main_process:
            self.run.log(line)
            save_checkpoint(
                self.run.checkpoints,
                f"epoch-{epoch + 1:05d}",
                dict(model=self.student.state_dict(), optimizer=optimizer_tensors(self.optimizer)),
                dict(epoch=epoch + 1, history=self.run.history),
                keep=recipe.keep_checkpoints,
            )
        return line

    def train_one_epoch(self, epoch: int) -> dict[str, float]:
        """Train for one epoch; return the mean of each loss term, top-1 and top-5."""
        self.network.train()
        evaluator = ClassificationEvaluator(self.accelerator.device)
        log: list[torch.Tensor] = []
        names: list[str] = []
        hidden = (
            None if self.accelerator.is_local_main_process else True
        )  # None hides it where nobody watches
        steps = len(self.batches)
        bar = tqdm(
            self.batches.epoch(epoch),
            desc=f"epoch {epoch + 1}",
            total=steps,
            leave=False,
            disable=hidden,
        )
        for step, (images, target) in enumerate(bar, start=1):
            logits, terms = self.forward(images, target)
            self.accelerator.backward(terms["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            evaluator.update(logits, target)
            names = list(terms)
            log.append(torch.stack([term.detach() for term in terms.values()]))
            if step % CHECK_EVERY == 0 or step == steps:
                recent = torch.stack(log[(step - 1) // CHECK_EVERY * CHECK_EVERY :]).cpu()
                check_finite(recent, names, step, epoch)
                bar.set_postfix(
                    top1=f"{evaluator.summary()['top1']:.1f}", loss=f"{recent[-1, 0]:.3f}"
                )
        means = self.accelerator.reduce(torch.stack(log).mean(0), "mean").tolist()
        scores = evaluator.compute(distributed=self.accelerator.num_processes > 1)
        return dict(
            zip(names, means, strict=True), train_top1=scores["top1"], train_top5=scores["top5"]
        )

    def forward(
        self, images: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the student's global logits `[B, K]` and the loss with its terms."""
        logits = self.network(images)
        if self.teacher is None:
            loss = F.cross_entropy(logits.float(), target)
            return logits, dict(loss=loss, loss_ce=loss)
        with self.accelerator.autocast():
            teacher_logits = self.teacher(images)
        return logits[:, 0], self.criterion(logits, teacher_logits, target)

    def measure_student(self) -> dict[str, float]:
        """Return the student's loss, top-1 and top-5 on the test split."""
        if (
            self.accelerator.num_processes > 1
        ):  # batch norm's statistics: those of the saved weights
            for buffer in self.student.buffers():
                torch.distributed.broadcast(buffer, src=0)
        return self._evaluate(self.student.eval())

    def measure_teacher(self) -> float | None:
        """Return the teacher's top-1 on the test split, if there is a teacher."""
        return self._evaluate(self.teacher.classify)["top1"] if self.teacher else None

    @torch.no_grad()
    def _evaluate(self, predict: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Evaluate in float32 at any training precision: scores belong to the weights alone."""
        evaluator = ClassificationEvaluator(self.accelerator.device)
        mean, std, batch_size = self.config["mean"], self.config["std"], self.recipe.eval_batch_size
        for images, target in eval_batches(
            self.test, mean, std, batch_size=batch_size, **self.share
        ):
            evaluator.update(predict(images), target)
        return dict(evaluator.compute(distributed=self.accelerator.num_processes > 1))

    def finish(self, teacher_top1: float | None) -> None:
        """Write the student as timm reads it, and the summary that marks the run as finished."""
        if self.accelerator.is_main_process:
            save_pretrained(
                self.student,
                self.run.path / "last",
                label_names=self.source.label_names,
                data_config=self.config,
            )
            self.run.write_json("summary.json", summarize(self.run.history, teacher_top1))
        self.accelerator.wait_for_everyone()


def check_finite(recent: torch.Tensor, names: list[str], step: int, epoch: int) -> None:
    """Stop at the first of the steps up to `step` whose terms are not all finite."""
    bad = (~recent.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        terms = ", ".join(
            f"{name} {value:g}" for name, value in zip(names, recent[first].tolist(), strict=True)
        )
        where = f"step {step - len(recent) + first + 1} of epoch {epoch + 1}"
        raise NonFiniteLossError(
            f"the loss is not finite at {where}: {terms}; try a smaller lr or beta"
        )


def describe(line: dict[str, Any], epochs: int) -> str:
    """Return an epoch's metrics as one line for people."""
    terms = " ".join(
        f"{name.removeprefix('loss_')} {line[name]:.3f}" for name in line if name.startswith("loss")
    )
    minutes = line["seconds"] * (epochs - line["epoch"]) / 60
    return (
        f"epoch {line['epoch']}/{epochs}  test top-1 {line['test_top1']:.2f}  "
        f"train top-1 {line['train_top1']:.2f}  "
        f"{terms}  lr {line['lr']:g}  {line['images_per_second']:.0f} images/s  "
        f"{minutes:.1f} min left"
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


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    command = parse_command(__doc__.splitlines()[0], arguments)
    try:
        main(command.recipe, command.run, resume=command.resume)
    except (DataError, ModelError, NonFiniteLossError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()

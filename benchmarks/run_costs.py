"""Tell apart what a run costs: its start, an epoch's steps, what follows an epoch, and its end.

    python benchmarks/run_costs.py --dataset uoft-cs/cifar100 --threads 2 --bf16 --out costs.json

Setup (b), a teacher of the zoo; seconds, each phase as the trainer goes through it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.interruption import Interruption
from gld_zoo.training.engine.state import TrainingState
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks import distiller
from gld_zoo.training.tasks.distiller import Distiller


class Clock:
    """Seconds a phase, added up over its calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Time a function of a module or a method of a class from here on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

        setattr(owner, name, timed)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train some epochs of setup (b); return the seconds of each phase."""
    clock = Clock()
    clock.watch(distiller, "open_source", "start: find the dataset")
    clock.watch(distiller, "build_models", "start: build both models")
    clock.watch(distiller, "load_data", "start: decode the images")
    clock.watch(Trainer, "train_one_epoch", "epochs: train")
    clock.watch(Trainer, "step", "epochs: of that, the steps themselves")
    clock.watch(Trainer, "score_of", "epochs: measure the student")
    clock.watch(TrainingState, "save", "epochs: checkpoint")
    clock.watch(RunFolder, "write_metrics", "epochs: metrics and curves")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if options.bf16 else "no")
    recipe = Recipe(
        student="gld_wrn16_1",
        teacher="gld_wrn16_2.ce_cifar100",
        dataset=options.dataset,
        epochs=options.epochs,
        threads=options.threads,
    )
    run = RunFolder(folder / "run", recipe, resume=False)
    trainer = Trainer(Distiller(recipe, accelerator), run)
    run.start(accelerator)
    clock.watch(trainer.task, "prepare", "start: measure the teacher")
    clock.watch(trainer, "measure_start", "start: measure the student")
    clock.watch(trainer, "finish", "end: write the model and the summary")
    trainer.task.prepare(run.path)
    trainer.measure_start()
    with Interruption(accelerator, max_minutes=None, checkpoint_minutes=30) as interruption:
        trainer.fit(lambda line: None, interruption)
    trainer.finish()
    seconds = {phase: round(spent, 2) for phase, spent in clock.seconds.items()}
    ratio = clock.seconds["epochs: train"] / clock.seconds["epochs: of that, the steps themselves"]
    return dict(seconds, **{"an epoch / its steps": round(ratio, 4)})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="gld_zoo/data/cifar100_mini", help="hub id or folder")
    parser.add_argument("--epochs", type=int, default=1, help="to train")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time an epoch of setup (a) on labels alone, from a teacher's store, and with the living teacher.

    python benchmarks/store.py --threads 2 --bf16 --out store.json

On the bundled images; seconds of the trainer's own epoch, without measuring. The three take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from measuring import interleave, ratio

from gld_zoo.training.common.devices import set_up_device
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.interruption import Interruption
from gld_zoo.training.engine.totals import Totals
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller

TEACHER = "gld_resnet110.ce_cifar100"


def trainer_of(folder: Path, accelerator: Accelerator, options: argparse.Namespace) -> Trainer:
    """Return a trainer of ResNet-20 in a run folder of that name."""
    choices = dict(
        alone=dict(),
        living=dict(teacher=TEACHER, views=1),
        store=dict(teacher=TEACHER, views=1, teacher_store=str(folder.parent / "answers")),
    )
    recipe = Recipe(
        student=options.student,
        dataset=options.dataset,
        batch_size=options.batch,
        epochs=10_000,
        lr=0.001,
        threads=options.threads,
        **choices[folder.name],
    )
    run = RunFolder(folder, recipe, resume=False)
    trainer = Trainer(Distiller(recipe, accelerator), run)
    run.start(accelerator)
    trainer.task.prepare(folder)
    return trainer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="gld_zoo/data/cifar100_mini", help="hub id or folder")
    parser.add_argument("--student", default="gld_resnet20", help="timm name")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each that are timed")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if options.bf16 else "no")
    set_up_device(accelerator, options.threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        Interruption(accelerator, max_minutes=None, checkpoint_minutes=1e6) as interruption,
    ):
        interruption.begin()

        def epochs_of(name: str) -> Callable[[], None]:
            trainer = trainer_of(Path(folder) / name, accelerator, options)

            def epoch() -> None:
                trainer.state.totals = Totals(trainer.device)
                trainer.train_one_epoch(0, interruption)

            return epoch

        calls = {name: epochs_of(name) for name in ("alone", "store", "living")}
        times = interleave(calls, rounds=options.rounds)  # the first epoch fills the store
    result = {name: round(statistics.median(each) / 1000, 2) for name, each in times.items()}
    result["store / alone"] = ratio(times, "store", "alone")
    result["living / store"] = ratio(times, "living", "store")
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time a training step of each method of the table, from a living teacher, in one process.

    python benchmarks/methods.py --threads 2 --bf16 --out benchmarks/results/methods.json

Each is the step of the trainer's loop by that method's recipe, its sums for the log included, on a
batch that is there; rounds take them in rotated order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from measuring import interleave, ratio
from step import BUNDLED, Step, our_step

from gld_zoo import recipes
from gld_zoo.results import METHODS
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller

SETUP = "b"  # of the paper
# the others are cifar100_SETUP_NAME
RECIPES = dict(alone="cifar100_wrn16_1", gld="cifar100_wrn16_2_wrn16_1")


def step_of(name: str, folder: Path, threads: int, accelerator: Accelerator) -> Step:
    """Return the step of a recipe on the bundled images."""
    recipe = Recipe.load(recipes.path_of(name))
    recipe = dataclasses.replace(recipe, dataset=BUNDLED, epochs=1, threads=threads)
    trainer = Trainer(Distiller(recipe, accelerator), RunFolder(folder, recipe, resume=False))
    trainer.task.prepare(folder)  # after which the teacher only teaches
    return our_step(trainer)


def main() -> None:
    """Measure all methods in one precision: Accelerate's state is the process's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="of timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16 autocast")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if options.bf16 else "no")
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            name: step_of(
                RECIPES.get(name, f"cifar100_{SETUP}_{name}"),
                Path(folder) / name,
                options.threads,
                accelerator,
            )
            for name in METHODS
        }
        times = interleave(steps, rounds=options.rounds)
    precision = "bf16" if options.bf16 else "float32"
    result: dict = dict(setup=SETUP, threads=options.threads, precision=precision)
    result["ms"] = {name: round(statistics.median(ms), 1) for name, ms in times.items()}
    result["times of alone"] = {name: ratio(times, name, "alone") for name in times}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

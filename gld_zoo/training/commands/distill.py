"""Distil a student from a teacher; without one, train on labels alone (a teacher, a baseline).

    gld-zoo distill --config quickstart
    accelerate launch --mixed_precision bf16 -m gld_zoo.training.distill --config RECIPE --seed 1
    accelerate launch --num_processes 4 -m gld_zoo.training.distill --config RECIPE --resume
    torchrun --nproc_per_node 2 -m -- gld_zoo.training.distill --config RECIPE  # on CPUs too

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.launch import launch
from gld_zoo.training.tasks.relations import task_of


def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    launch(task_of, Recipe, __doc__.splitlines()[0], arguments, prog)

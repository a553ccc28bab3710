"""Distil a student from a teacher; without one, train on labels alone (a teacher, a baseline).

    accelerate launch --cpu train/distill.py --config train/recipes/quickstart.yaml
    accelerate launch --mixed_precision bf16 train/distill.py --config FILE --seed 1
    accelerate launch --num_processes 4 train/distill.py --config FILE --resume
    torchrun --nproc_per_node 2 -- train/distill.py --config FILE --run DIR  # on CPUs too

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

from distiller import Distiller
from launch import launch
from recipe import Recipe


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    launch(Distiller, Recipe, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    cli()

"""Distil a student from a teacher; without one, train on labels alone (a teacher, a baseline).

    gld-zoo distill --config quickstart
    ACCELERATE_MIXED_PRECISION=bf16 gld-zoo distill --config RECIPE --seed 1
    accelerate launch --num_processes 4 -m gld_zoo.training.distill --config RECIPE --resume
    torchrun --nproc_per_node 2 -m -- gld_zoo.training.distill --config RECIPE  # on CPUs too

Precision, devices and process count are Accelerate's. Options: `--help`.
"""

from __future__ import annotations

import argparse
import os

from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.opening import is_image_folder
from gld_zoo.training.engine.launch import launch
from gld_zoo.training.tasks.relations import task_of

PHOTOS = "photos"
DESCRIPTION = (
    f"{__doc__.splitlines()[0]} The defaults below are the paper's; for a plain folder of images "
    f"and a teacher that does not know their classes (--teacher_head fit or none) those of recipe "
    f"{PHOTOS} come before them: gld-zoo info {PHOTOS} shows which."
)


def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    if teaches_photographs(arguments):
        arguments = ["--config", PHOTOS, *arguments]
        if os.environ.get("RANK", "0") == "0":
            print(
                f"a folder of images: options that are not given are those of recipe {PHOTOS} "
                f"(gld-zoo info {PHOTOS} shows them; name another by --config)"
            )
    launch(task_of, Recipe, DESCRIPTION, arguments, prog)


def teaches_photographs(arguments: list[str]) -> bool:
    """Tell whether a teacher without the dataset's classes is given a plain folder of images.

    The defaults are the paper's, of small images of 100 classes; whoever has photographs of their
    own wants others.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "dataset", "teacher_head", "run"):
        parser.add_argument(f"--{name}", nargs="?")
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    if given.config or given.teacher_head not in ("fit", "none") or not given.dataset:
        return False
    if given.resume and given.run and os.path.isfile(os.path.join(given.run, "recipe.yaml")):
        return False  # it goes on with its own
    return is_image_folder(given.dataset)

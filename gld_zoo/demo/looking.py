"""What the page shows of models and pictures; nothing of this knows how the page is laid out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image, UnidentifiedImageError

from gld_zoo.distillation.teacher import HEAD_FILE
from gld_zoo.hub import is_run
from gld_zoo.images import find_images, read_image
from gld_zoo.output import CommandError
from gld_zoo.predictor import Predictor, create_predictor
from gld_zoo.results import Results

STUDENT = "gld_wrn16_1.wrn16_2_cifar100"
EXAMPLES = Path(__file__).parent.parent / "data" / "examples"
SHOWN = 12  # examples at most
CLASSES = 3  # named for each picture
KNOWN = 12  # classes of a model that are listed
KEPT = 8  # models that stay loaded


class Loaded(NamedTuple):
    """A model, and what one is told of it: milliseconds are of a forward pass of one picture."""

    predictor: Predictor
    numbers: dict[str, Any]
    origin: str

    def told(self) -> str:
        """Return the numbers, the classes and where the model is from, as a line."""
        parameters, pixels, milliseconds = list(self.numbers.values())[1:]
        names = [name.replace("_", " ") for name in self.predictor.names]
        more = "" if len(names) <= KNOWN else ", ..."
        return (
            f"{parameters:,} parameters, {milliseconds} ms a picture of {pixels} pixels; knows "
            f"{len(names):,} classes: {', '.join(names[:KNOWN])}{more}{self.origin}"
        )


class View(NamedTuple):
    """What is shown of a model: its classes, its cells, and a note, also of what is wrong."""

    classes: dict[str, float] | None = None
    cells: Image.Image | None = None
    note: str = ""
    numbers: dict[str, Any] | None = None


def zoo_models() -> list[str]:
    """Return the names of all weights that ship, the students first."""
    weights = Results.load().weights
    return sorted(weights, key=lambda name: (weights[name].teacher is None, name))


def teacher_of(student: str) -> str | None:
    """Return the teacher of a model of the zoo, if its weights ship, or of a run.

    Where a head was fitted to it, that is the head's file. One of relations alone names no classes.
    """
    if is_run(student):
        recipe = _recipe_of(student)
        fitted = str(Path(student) / HEAD_FILE)
        teachers = dict(own=recipe.get("teacher"), fit=fitted, none=None)
        return teachers[recipe.get("teacher_head", "own")]
    weights = Results.load().weights
    row = weights.get(student)
    return row.teacher.name if row and row.teacher and row.teacher.name in weights else None


def _recipe_of(run: str) -> dict[str, Any]:
    return yaml.safe_load((Path(run) / "recipe.yaml").read_text(encoding="utf-8"))


def _origin_of(name: str) -> str:
    """Return what is told of a run's teacher that cannot stand beside it, or has a fitted head."""
    if Path(name).name == HEAD_FILE:
        teacher = _recipe_of(str(Path(name).parent))["teacher"]
        return f". It is {teacher} with the head that this run fitted to these classes"
    recipe = _recipe_of(name) if is_run(name) else {}
    if recipe.get("teacher_head") != "none":
        return ""
    return (
        f". It was taught by the relations of {recipe['teacher']}'s features, which name no "
        "classes, so that is not shown beside it; another model can be chosen there"
    )


@lru_cache(maxsize=KEPT)
def load(name: str) -> Loaded:
    """Load a model, or take it from those kept.

    Args:
        name: As for `create_predictor`.

    Raises:
        CommandError: If it cannot be created with weights.
    """
    predictor = create_predictor(name)
    height, width = predictor.config["input_size"][1:]
    numbers = dict(
        model=name,
        parameters=sum(weight.numel() for weight in predictor.model.parameters()),
        pixels=f"{width} x {height}",
        milliseconds=round(_seconds(predictor) * 1000, 1),
    )
    return Loaded(predictor, numbers, _origin_of(name))


@torch.no_grad()
def _seconds(predictor: Predictor) -> float:
    """Return how long a forward pass takes: the shortest of four, as the first ones warm up."""
    image, times = torch.zeros(1, *predictor.config["input_size"]), []
    for _ in range(4):
        start = time.perf_counter()
        predictor.logits(image)
        times.append(time.perf_counter() - start)
    return min(times)


def read_picture(path: str) -> Image.Image:
    """Read an image that somebody gave.

    Raises:
        CommandError: If it is none, or damaged; the message is for them to read.
    """
    name = Path(path).name
    try:
        return read_image(Path(path))
    except UnidentifiedImageError as error:
        raise CommandError(
            f"{name} is not a picture that can be read; give a JPEG, PNG, WebP, GIF, BMP or TIFF"
        ) from error
    except Exception as error:  # a damaged one may raise anything
        raise CommandError(f"{name} cannot be read: {error}; give another picture") from error


def look(name: str, image: Image.Image, grid: int) -> View:
    """Return what a model sees in an image; what cannot be had is told in the note.

    Args:
        name: As for `create_predictor`.
        image: RGB.
        grid: Cells along each side.
    """
    try:
        model = load(name)
    except CommandError as error:
        reason = str(error).removeprefix("--model ").rstrip(".")
        return View(note=f"**No such model to show.** {reason}. Choose one from the list.")
    found = model.predictor.classify([image], CLASSES)[0]
    classes = {label.replace("_", " "): probability for label, probability in found}
    try:
        cells = model.predictor.explain(image, grid)
    except CommandError as error:
        note = f"{model.told()}\n\n**No {grid} x {grid} cells to show.** {error}."
        return View(classes, None, note, model.numbers)
    return View(classes, cells, model.told(), model.numbers)


def find_examples(patterns: Sequence[str]) -> list[str]:
    """Return some of the images that are named, spread evenly over them.

    Args:
        patterns: Files, folders, or patterns of them; without any, the images that come with us.

    Raises:
        CommandError: If there is no image, or one that is named is none.
    """
    found = list(find_images(patterns or [str(EXAMPLES)]))
    if not found:
        raise CommandError(f"--examples: no image in {' '.join(patterns)}")
    count = min(SHOWN, len(found))
    chosen = [found[len(found) * (2 * place + 1) // (2 * count)] for place in range(count)]
    for path in chosen:
        read_picture(str(path))
    return list(map(str, chosen))


def first_pair(models: Sequence[str], teacher: str | None) -> tuple[str, str | None]:
    """Return the names of the models that the page begins with."""
    first = [*models, STUDENT][0]
    return first, teacher or teacher_of(first)

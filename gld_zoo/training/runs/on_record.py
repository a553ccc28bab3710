"""What is on record beside a run that is being trained: the same recipe on the labels alone."""

from __future__ import annotations

from dataclasses import replace

from gld_zoo import recipes
from gld_zoo.results import PATH, Results, Row
from gld_zoo.training.config.recipe import Recipe


def labels_alone(recipe: Recipe) -> float | None:
    """Return the top-1, in %, of a recipe without its teacher, if a row of that is on record.

    It is that of the last epoch, of the row's first seed. Where the images lie is not compared, but
    for the name of their last folder.
    """
    if not PATH.is_file():
        return None
    results = Results.load()
    for row in [*results.runs.values(), *results.weights.values()]:
        if row.teacher is None and row.epochs == recipe.epochs and _follows(row, recipe):
            return row.runs[0].top1
    return None


def _follows(row: Row, recipe: Recipe) -> bool:
    """Tell whether a row was trained by a recipe, its teacher and its seed aside."""
    used = replace(Recipe.load(recipes.path_of(row.recipe)), **row.changes)
    names = set(recipe.deciding()) - {*Recipe.OF_A_TEACHER, "seed", "dataset", "compile"}
    same = all(getattr(used, name) == getattr(recipe, name) for name in names)
    return same and recipe.dataset.rpartition("/")[2] == used.dataset.rpartition("/")[2]

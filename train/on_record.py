"""What `gld_zoo/results.json` has on record beside a run that is being trained."""

from __future__ import annotations

import json
from dataclasses import replace

from recipe import Recipe
from sources import CHECKOUT

RESULTS = CHECKOUT / "gld_zoo" / "results.json"
RECIPES = CHECKOUT / "train" / "recipes"
OF_A_TEACHER = {"teacher", "grid", "alpha", "beta", "local_weight", "ce_weight", "global_weight"}
OF_A_TEACHER |= {"temperature", "standardise", "disagreement"}


def labels_alone(recipe: Recipe) -> float | None:
    """Return the top-1, in %, of a recipe without its teacher, if a row of that is on record.

    It is that of the last epoch, of the row's first seed. Where the images lie is not compared, but
    for the name of their last folder.
    """
    if not RESULTS.is_file():
        return None
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for entry in (results["runs"] | results["weights"]).values():
        if entry["teacher"] is None and _follows(entry, recipe):
            return entry["runs"][0]["top1"]
    return None


def _follows(entry: dict, recipe: Recipe) -> bool:
    """Tell whether a row was trained by a recipe, its teacher and its seed aside."""
    used = replace(Recipe.load(RECIPES / f"{entry['recipe']}.yaml"), **entry["changes"])
    names = set(recipe.deciding()) - OF_A_TEACHER - {"seed", "dataset", "compile"}
    same = all(getattr(used, name) == getattr(recipe, name) for name in names)
    return same and recipe.dataset.rpartition("/")[2] == used.dataset.rpartition("/")[2]

"""The store of a run's teacher: which it is, and where."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from gld_zoo.training.data.batches import WithRows
from gld_zoo.training.data.memory import MemoryBatches
from gld_zoo.training.teaching.answers import Answers, choose_answers
from gld_zoo.training.teaching.key import ingredients, key_of
from gld_zoo.training.teaching.store import DamagedStoreError, Store
from gld_zoo.training.teaching.together import on_main


def open_store(run: Any) -> tuple[Store, Answers]:
    """Return the store of a run's teacher, as it is on the disk, and how rows are kept.

    A damaged one of `teacher_store: auto` is set aside.

    Raises:
        StoreError: If the folder holds something else, a damaged store, or one of other rows.
    """
    recipe, accelerator = run.recipe, run.accelerator
    classes = len(run.source.label_names)
    answers = choose_answers(run.models.teacher, recipe.grid, classes, recipe.store_dtype)

    def found() -> Store:
        info = describe_store(run, answers)
        folder = store_folder(recipe.teacher_store, info["key"])
        return _open(folder, info, anew=recipe.teacher_store == "auto")

    return on_main(accelerator, found), answers


def _open(folder: Path, info: dict[str, Any], *, anew: bool) -> Store:
    try:
        return Store.open(folder, info)
    except DamagedStoreError as error:
        if not anew:
            raise
        aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
        os.replace(folder, aside)
        print(f"{error}; it is set aside as {aside}")
        return Store.open(folder, info)


def describe_store(run: Any, answers: Answers) -> dict[str, Any]:
    """Return what the `store.json` of a run's teacher is to hold."""
    train = run.data.train
    batches = train.batches if isinstance(train, WithRows) else train
    made_of = ingredients(
        run.recipe,
        run.rows,
        run.models.config,
        run.models.teacher,
        answers,
        teacher_sha256=run.models.teacher_identity,
        path="memory" if isinstance(batches, MemoryBatches) else "loader",
        precision=run.accelerator.mixed_precision,
    )
    return dict(
        key=key_of(made_of),
        teacher=run.recipe.teacher,
        dataset=run.recipe.dataset,
        made_of=made_of,
        recipe=dataclasses.asdict(run.recipe),
    )


def store_folder(name: str, key: str) -> Path:
    """Return a store's folder; of `auto` one for its key."""
    if name != "auto":
        return Path(name).expanduser()
    root = os.environ.get("GLD_ZOO_CACHE") or str(Path.home() / ".cache" / "gld_zoo")
    return Path(root).expanduser() / "teacher_stores" / key[:20]

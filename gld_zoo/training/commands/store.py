"""Keep what a teacher answers on each view of each image, so that it is asked once.

    gld-zoo store build --config photos --dataset DIR --teacher NAME --teacher_store FOLDER
    gld-zoo store info FOLDER
    gld-zoo store verify FOLDER --dataset DIR

`build` takes the options of `gld-zoo distill`, asks for what a store lacks, and may be ended and
begun again; runs with the same options then read it. `verify` compares each view with its hash, and
a sample with the living teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt

from gld_zoo.output import end, printing
from gld_zoo.training.common.errors import DiskError, StoreError, TrainingError
from gld_zoo.training.config.command_line import parse_recipe
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.launch import begin, mistakes_told
from gld_zoo.training.measure.tables import table
from gld_zoo.training.tasks.store_work import build_store, check_rows
from gld_zoo.training.teaching.store import Store


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    actions = dict(build=build, verify=verify, info=info)
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=list(actions), help="what to do; --help behind it")
    action = parser.parse_args(arguments[:1]).action
    actions[action](arguments[1:], f"{parser.prog} {action}")


def build(arguments: list[str], prog: str) -> None:
    """Ask a recipe's teacher for what its store lacks."""
    recipe = parse_recipe(
        Recipe, "Ask a teacher once for each view of each image.", arguments, prog
    )
    with mistakes_told(recipe, "make room and begin again, or name another teacher_store"):
        if recipe.teacher_store is None:
            recipe = _with_store(recipe)
        accelerator = begin(recipe)
        store = build_store(recipe, accelerator)
        if accelerator.is_main_process:
            print(table(facts_of(store)))
        accelerator.end_training()


def _with_store(recipe: Recipe) -> Recipe:
    try:
        return dataclasses.replace(recipe, teacher_store="auto")
    except ValueError as error:  # as of views that are not set
        raise StoreError(str(error)) from error


def info(arguments: list[str], prog: str) -> None:
    """Print what a store holds."""
    parser = ArgumentParser(prog=prog, description="Tell what a store holds and what it took.")
    parser.add_argument("folder", type=Path, help="the store's folder")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(arguments)
    try:
        store = Store.read(options.folder)
    except TrainingError as error:
        sys.exit(f"error: {error}")
    facts = facts_of(store)
    print(
        json.dumps(dict(facts, made_of=store.info["made_of"]), indent=2)
        if options.json
        else table(facts)
    )


def facts_of(store: Store) -> dict[str, Any]:
    """Return what people want to know of a store."""
    made_of, complete = store.info["made_of"], store.complete()
    kept = made_of["kept"]
    records = [store.record(view) or {} for view in complete]
    return dict(
        store=str(store.folder),
        teacher=store.info["teacher"],
        head=made_of["head"]["kind"],
        dataset=store.info["dataset"],
        images=store.count,
        views=f"{len(complete)} of {store.views} complete",
        rows="{shape[0]} of {shape[1]} {what} in {dtype} an image".format(**kept),
        size=f"{store.bytes() / 2**20:.1f} MiB",
        asked=f"{sum(record.get('seconds', 0) for record in records):.0f} s of the teacher's time",
    )


def verify(arguments: list[str], prog: str) -> None:
    """Compare a store with its hashes and with its teacher; exit with 1 if they differ."""
    parser = ArgumentParser(
        prog=prog, description="Compare a store with its hashes, and with the living teacher."
    )
    parser.add_argument("folder", type=Path, help="the store's folder")
    parser.add_argument("--dataset", type=str | None, help="null: where it was when it was made")
    parser.add_argument("--teacher", type=str | None, help="null: likewise")
    parser.add_argument(
        "--sample",
        type=NonNegativeInt,
        default=32,
        help="images of each view to ask the teacher for; 0: none",
    )
    options = parser.parse_args(arguments)
    try:
        store = Store.read(options.folder)
        wrong = _compare_hashes(store)
        if not wrong and options.sample:
            wrong = _compare_rows(store, options)
    except TrainingError as error:
        sys.exit(f"error: {error}")
    if wrong:
        sys.exit(f"error: {wrong}")


def _compare_hashes(store: Store) -> str | None:
    """Print of each view if it is what was written; return what to do if one is not."""
    complete, wrong = store.complete(), store.half_complete()
    unread: list[int] = []
    for view in range(store.views):
        told = "whole"
        if view in wrong:
            told = f"damaged: {store.path(view)} or its JSON is not what was written"
        elif view not in complete:
            told = "not complete"
        else:
            try:
                store.check(view)
                store.rows(view)
            except (DiskError, StoreError) as error:
                (unread if isinstance(error, DiskError) else wrong).append(view)
                told = str(error)
        print(f"view {view + 1} of {store.views}: {told}")
    if wrong:
        return "the store is not what was written; gld-zoo store build makes the views named anew"
    if unread:
        return "the disk does not give all views; verify again when it does"
    return None if complete else "no view is complete; gld-zoo store build makes them"


def _compare_rows(store: Store, options: Any) -> str | None:
    """Print of each view how far it is from the living teacher; return what to do if it is."""
    try:
        recipe = Recipe(**store.info["recipe"])
    except (TypeError, ValueError) as error:
        raise StoreError(f"{store.folder} was made by another version ({error})") from error
    changes = {name: value for name in ("dataset", "teacher") if (value := options[name])}
    precision = store.info["made_of"]["precision"]
    accelerator = begin(dataclasses.replace(recipe, **changes), mixed_precision=precision)
    good = True
    for view, difference, same in check_rows(
        store, dataclasses.replace(recipe, **changes), accelerator, options.sample
    ):
        good &= same
        verdict = "as the teacher answers now" if same else "not what the teacher answers"
        print(f"view {view + 1} of {store.views}: {verdict} (largest difference {difference:.1e})")
    return (
        None if good else f"the rows are not this teacher's; delete {store.folder}, or name another"
    )

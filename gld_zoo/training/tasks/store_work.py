"""Make a teacher's store ahead of time, and compare one with its teacher."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gld_zoo.training.common.errors import RunError, StoreError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.tasks.relations import task_of
from gld_zoo.training.teaching.asking import AskedOnce
from gld_zoo.training.teaching.store import Store
from gld_zoo.training.teaching.taught import TaughtBy

# how far rows may be from those of another batch, as a share of the largest number: sums of
# float32 in another order, float16 with 11 bits, bfloat16 with 8 in every layer
TOLERANCE = dict(float32=1e-4, float16=2e-3)
TOLERANCE_MIXED = 5e-2


def build_store(recipe: Recipe, accelerator: Accelerator) -> Store:
    """Ask a recipe's teacher for all views that its store lacks, and tell of each.

    Raises:
        RunError: If the recipe has no teacher.
        StoreError: If the store cannot be written, or is not this recipe's.
    """
    with _asking(recipe, accelerator) as (taught_by, asked):
        for line in taught_by.introduction():
            accelerator.print(line)
        for view in range(asked.store.views):
            began = time.monotonic()
            asked.begin(view)
            if told := asked.end():
                rate = asked.store.count / max(1e-9, time.monotonic() - began)
                accelerator.print(f"{told}: {rate:.0f} images/s")
            elif asked.known is None:
                raise StoreError(f"{asked.store.folder} cannot be written: {asked.refusal}")
        return asked.store


def check_rows(
    store: Store, recipe: Recipe, accelerator: Accelerator, sample: int
) -> Iterator[tuple[int, float, bool]]:
    """Ask the living teacher for a sample of each complete view of a store.

    Args:
        store: To compare with it.
        recipe: That made it, its teacher and dataset where they are now.
        accelerator: One process, of the store's precision.
        sample: Images of each view.

    Yields:
        The view, the largest difference as a share of the largest number, and if that is rounding.

    Raises:
        DataError: If the images are not there.
        ModelError: If the teacher is not.
        StoreError: If other rows would be made today, naming why.
    """
    tolerance = TOLERANCE[recipe.store_dtype]
    if store.info["made_of"]["precision"] != "no":
        tolerance = TOLERANCE_MIXED
    recipe = dataclasses.replace(recipe, teacher_store=str(store.folder))
    with _asking(recipe, accelerator, writes=False) as (_, asked):
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randperm(store.count, generator=generator)[:sample].sort().values
        for view in store.complete():
            known, largest = store.rows(view), 0.0
            for which, images in asked.batches.of_view(view, numbers, asked.batch_size):
                kept = known[which].float()
                difference = (asked.ask(images).cpu().float() - kept).abs().max()
                largest = max(largest, (difference / kept.abs().max()).item())
            yield view, largest, largest <= tolerance


@contextlib.contextmanager
def _asking(
    recipe: Recipe, accelerator: Accelerator, *, writes: bool = True
) -> Iterator[tuple[TaughtBy, AskedOnce]]:
    """Give a recipe's teacher, ready to be asked outside of a run."""
    if not recipe.keeps_answers:
        raise RunError("a store keeps what a teacher answers; name one by --teacher")
    taught_by = task_of(recipe, accelerator).taught_by
    assert taught_by is not None
    with _scratch(accelerator) as folder:
        taught_by.prepare(folder, writes=writes)
        assert taught_by.asked is not None
        yield taught_by, taught_by.asked


@contextlib.contextmanager
def _scratch(accelerator: Accelerator) -> Iterator[Path]:
    """Give all processes of this machine a folder that goes when it is done with."""
    with contextlib.ExitStack() as stack:
        name: list[str | None] = [None]
        if accelerator.is_main_process:
            name[0] = stack.enter_context(tempfile.TemporaryDirectory())
        if accelerator.num_processes > 1:
            broadcast_object_list(name)
        yield Path(str(name[0]))
        accelerator.wait_for_everyone()

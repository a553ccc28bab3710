"""What the main process finds out for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gld_zoo.training.common.errors import StoreError, TrainingError

Value = TypeVar("Value")


def on_main(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """Return on all processes what the main one found.

    Raises:
        StoreError: If it could not be done, on all of them.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (TrainingError, OSError) as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise StoreError(outcome[1])
    return outcome[0]

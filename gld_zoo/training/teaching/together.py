"""What the main process finds out for all, and what each finds out of its share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gld_zoo.training.common.errors import StoreError, TrainingError
from gld_zoo.training.data.batches import EvalBatches, Share

Value = TypeVar("Value")
REDUCED = 1 << 15  # rows of features that are summed over the processes at once


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


@torch.no_grad()
def of_all_processes(
    features: Callable[[torch.Tensor], torch.Tensor],
    batches: EvalBatches,
    count: int,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Return features `[N, D]` of the first N images of a split, in order, on the CPU.

    Args:
        features: Maps images to theirs `[B, D]`.
        batches: This process's share of the split.
        count: N.
        accelerator: Of the run.
    """
    share = Share(accelerator.process_index, accelerator.num_processes)
    numbers = share.of(torch.arange(count))
    found: list[torch.Tensor] = []
    for images, *_ in batches:
        found.append(features(images).cpu())  # a device may not hold those of all
        if sum(map(len, found)) >= len(numbers):
            break
    own = torch.cat(found)[: len(numbers)]
    if accelerator.num_processes == 1:
        return own
    whole = own.new_zeros(count, own.shape[1])
    whole[numbers] = own
    blocks = whole.split(REDUCED)
    return torch.cat([accelerator.reduce(block.to(accelerator.device)).cpu() for block in blocks])

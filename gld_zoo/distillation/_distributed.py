"""Sums and rows over the processes of the default process group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Tell whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_up(tensor: torch.Tensor, world_size: int) -> torch.Tensor:
    """Add up a tensor over processes, in place where it is contiguous."""
    if world_size > 1:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def gather(rows: torch.Tensor, world_size: int) -> torch.Tensor:
    """Concatenate the rows `[n, K]` of all processes in rank order."""
    if world_size == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def check_equal_rows(rows: torch.Tensor) -> None:
    """Refuse a tensor that does not have as many rows on every process.

    Raises:
        ValueError: If it has not; on a GPU the device's own assertion fails instead.
    """
    counts = torch.full((2,), len(rows), device=rows.device)  # made there: no copy to wait for
    counts[1].neg_()
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    remedy = (
        "the relation over the global batch needs as many rows of logits on every process; drop "
        "the incomplete last batch"
    )
    if rows.device.type == "cuda":  # without waiting for the device
        torch._assert_async(counts.sum() == 0, remedy)
        return
    largest, smallest = counts[0].item(), -counts[1].item()
    if largest != smallest:
        raise ValueError(f"processes hold from {smallest} to {largest} rows; {remedy}")

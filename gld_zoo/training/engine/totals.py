"""An epoch's running sums: loss terms, accuracy, time; none read from the device but to show."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator

from gld_zoo.training.common.errors import NonFiniteLossError


class Totals:
    """Sums over an epoch's steps, and the steps since the loss was last looked at.

    Args:
        device: Where the loss is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.steps = 0
        self.seconds = 0.0
        self._sums = torch.zeros(0)
        self._recent: list[torch.Tensor] = []
        self._began: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Add the time since `start`."""
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
        self._began = None

    def per_second(self) -> float:
        """Return steps a second."""
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self.steps / max(self.seconds + running, 1e-9)

    @torch.no_grad()
    def add(self, terms: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
        """Add a step's loss terms, and other scalars to average."""
        values = {**terms, **others}
        self._recent.append(torch.stack([value.detach().float() for value in values.values()]))
        self.names = list(values)
        self.steps += 1

    def check(self, step: int, epoch: int) -> None:
        """Add up the recent steps, up to `step` of `epoch` (from 0), if all are finite.

        Raises:
            NonFiniteLossError: If one is not; it names the first.
        """
        if not self._recent:
            return
        recent = torch.stack(self._recent).cpu().double()  # Apple's GPUs have no float64
        bad = (~recent.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            first = int(bad[0])
            pairs = zip(self.names, recent[first].tolist(), strict=True)
            terms = ", ".join(f"{name} {value:g}" for name, value in pairs if "loss" in name)
            where = f"step {step - len(recent) + first + 1} of epoch {epoch + 1}"
            raise NonFiniteLossError(
                f"the loss is not finite at {where}: {terms}; try a smaller lr"
            )
        self._sums = recent.sum(0) + (self._sums if len(self._sums) else 0)
        self._recent.clear()

    def means(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Return the mean over the checked steps of each term, over all processes if given."""
        values = self._sums / max(self.steps - len(self._recent), 1)
        if accelerator is not None and accelerator.num_processes > 1:
            values = accelerator.reduce(values.to(accelerator.device), "mean")
        return dict(zip(self.names, values.tolist(), strict=True))

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return what a checkpoint keeps; every process must call it."""
        return dict(means=self.means(accelerator), steps=self.steps, seconds=self.seconds)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.names = list(state["means"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        means = torch.tensor(list(state["means"].values()), dtype=torch.float64)
        self._sums = means * self.steps

"""When to write a checkpoint before an epoch's end, and when to stop there."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from gld_zoo.training.common.signals import SIGNALS

CHECK_EVERY = 20  # steps between the processes' agreements on it
ONE_KEYPRESS = 1.0  # seconds in which launchers pass the same Ctrl-C on
BEFORE_MEASURING = 60.0  # seconds of training that are not risked while an epoch is measured


class Stopped(Exception):
    """The run was asked to stop, and a checkpoint holds all of it."""


class Interruption:
    """A context that notices SIGTERM, Ctrl-C and a time limit, and when a checkpoint is due.

    Several processes agree every `CHECK_EVERY` steps and at each epoch's end, so that all stop at
    the same one; a single process stops at the next step. The limit counts from here. SIGTERM may
    come again, as from a launcher that passes on what its processes got too; Ctrl-C pressed a
    second time ends the program at once. Before `begin` there is nothing to save, and a signal
    raises KeyboardInterrupt.

    Args:
        accelerator: The processes that must agree.
        max_minutes: Limit of the run; None for none.
        checkpoint_minutes: Between checkpoints within an epoch.
    """

    def __init__(
        self, accelerator: Accelerator, *, max_minutes: float | None, checkpoint_minutes: float
    ) -> None:
        self.accelerator = accelerator
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.interval = 60 * checkpoint_minutes
        self.saved = time.monotonic()
        self.reason: str | None = None
        self.begun = False
        self._noticed = -math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                    self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def begin(self) -> None:
        """Hold signals back from here on until a checkpoint is written."""
        self.begun = True

    def _notice(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._noticed <= ONE_KEYPRESS:
                return
            if self._noticed > -math.inf:
                self._restore()
                signal.raise_signal(signal.SIGINT)
                return
            self._noticed = now
        if self.reason is not None:
            return
        self.reason = signal.Signals(number).name
        if not self.begun:
            raise KeyboardInterrupt
        if self.accelerator.is_local_main_process:
            # print could meet itself here, half way through a line
            often = "" if number == signal.SIGINT else " twice"
            text = f"\n{self.reason}: ending at a checkpoint; Ctrl-C{often} ends at once\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    def due(self, step: int, *, last: bool = False) -> tuple[bool, bool]:
        """Tell after a step whether to write a checkpoint, and whether to stop after that.

        Args:
            step: Counted from 1.
            last: Whether it is the epoch's last, which is measured next: that may take longer than
                a batch system waits, so what is older than a minute is saved before.
        """
        if not last and self.accelerator.num_processes > 1 and step % CHECK_EVERY:
            return False, False
        return self._agree(BEFORE_MEASURING if last else math.inf)

    def _agree(self, interval: float = math.inf) -> tuple[bool, bool]:
        now = time.monotonic()
        if self.reason is None and self.deadline is not None and now >= self.deadline:
            self.reason = "max_minutes"
        stop, save = self.reason is not None, now - self.saved >= min(interval, self.interval)
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([stop, save], dtype=torch.int32, device=self.accelerator.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            stop, save = bool(flags[0]), bool(flags[1])
        return stop or save, stop

    @property
    def cause(self) -> str:
        """What asked to stop."""
        return self.reason or "another process"

    def stopping(self) -> bool:
        """Tell at an epoch's end, where a checkpoint has just been written, whether to stop."""
        return self._agree()[1]

    def written(self) -> None:
        """Count the minutes to the next checkpoint from now."""
        self.saved = time.monotonic()

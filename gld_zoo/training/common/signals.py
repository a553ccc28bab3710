"""Which signals end a run, and what the processes that read images do about them."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def ignore_signals(_: int) -> None:
    """Leave the end to the process that trains: a signal to all must not cost it its images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def end_workers_at_exit() -> None:
    """Have workers that a live loader still has at exit ended before Python waits for them.

    multiprocessing would ask them by SIGTERM, which they ignore, and wait for ever. What is
    registered last comes first, and multiprocessing registered when it was imported.
    """
    atexit.register(_end_workers)


def _end_workers() -> None:
    """Kill the workers that are left."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report them as killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:  # those that it ends without being asked
            process.kill()

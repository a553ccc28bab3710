"""Time and memory, measured the same way by every benchmark."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Calls = dict[str, Callable[[], None]]


def interleave(
    calls: Calls, *, rounds: int, seconds: float = 0.0, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each call once a round; milliseconds.

    The order is rotated, and turned round every other time, so that none always follows the same.

    Args:
        calls: What to time.
        rounds: At least so many.
        seconds: Go on at least for so long.
        warmup: Rounds before those.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    count, end = 0, time.perf_counter() + seconds
    while count < rounds + warmup or time.perf_counter() < end:
        for name in names if count % 2 else reversed(names):
            began = time.perf_counter()
            calls[name]()
            if count >= warmup:
                times[name].append(1000 * (time.perf_counter() - began))
        if count % 2:
            names = names[1:] + names[:1]
        count += 1
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Return the median over rounds of one call's time over another's."""
    pairs = zip(times[above], times[below], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def peak_memory() -> float:
    """Return this process's largest resident size so far, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes
    # getrusage would give the size of the process that started this one, if that is larger
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) * 1024 / 1e6

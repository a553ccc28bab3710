"""Printing without tracebacks: of letters that do not fit, on full disks, to readers that left."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

PIPE_ENDED = 141  # as shells show of a program whose reader has ended: 128 and SIGPIPE's number


class CommandError(ValueError):
    """What was asked cannot be done; the message names it and the remedy."""


class Output:
    """A stream for printing that never raises; once it takes nothing more, the rest is dropped.

    Args:
        stream: Standard output or error.
        failed: Is told why it takes nothing, once.
    """

    def __init__(self, stream: TextIO, failed: Callable[[OSError], object]) -> None:
        self._stream = stream
        self._failed = failed
        if isinstance(stream, io.TextIOWrapper):  # a name may hold what its encoding does not
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is held back, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # what is held back would be tried again at the exit
        os.close(null)
        self._failed(error)


@contextlib.contextmanager
def printing(failed: Callable[[OSError], object]) -> Iterator[None]:
    """Print whatever the streams' encoding, and without a traceback where they take nothing.

    Args:
        failed: Is told why standard output takes nothing, once.
    """
    with contextlib.ExitStack() as stack:
        out, err = (
            stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            for stream in (sys.stdout, sys.stderr)
        )
        # nobody is left to be told that standard error takes nothing
        stderr = Output(err, lambda error: None)
        stack.enter_context(contextlib.redirect_stderr(cast(TextIO, stderr)))
        if sys.stdout is None:  # the caller had it closed
            failed(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        stack.enter_context(contextlib.redirect_stdout(cast(TextIO, Output(out, failed))))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def end(error: OSError) -> None:
    """End a program whose purpose is what it prints: in silence if its reader has had enough."""
    if isinstance(error, BrokenPipeError):
        sys.exit(PIPE_ENDED)
    sys.exit(f"error: cannot write to standard output: {error.strerror}; send it elsewhere")

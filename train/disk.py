"""Files that are whole or absent, and what to say when the disk refuses."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class DiskError(RuntimeError):
    """Something could not be written; the message names it, the reason and the remedy."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line for people.

    Raises:
        DiskError: If writing fails inside the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(
            f"cannot write {path}: {reason}; what was written before is untouched: mend the disk "
            "and go on with --resume"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; it takes the place of `path` once it is whole.

    Raises:
        DiskError: If writing fails; `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

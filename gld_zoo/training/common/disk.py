"""Files that are whole or absent, locks, and what to say when the disk refuses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from gld_zoo.training.common.errors import DiskError, HeldError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
            f"cannot write {path}: {reason}; what was written before is untouched"
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
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give a folder its name once its files are on the disk; an earlier one of that name goes."""
    for written in [*temporary.iterdir(), temporary]:
        flush(written)
    old = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def lock(path: Path) -> IO[str]:
    """Lock a file for as long as this process lives, or the returned file is open.

    Raises:
        HeldError: If another process holds it.
    """
    file = path.open("a+", encoding="utf-8")
    if fcntl is None:
        return file
    try:
        # of the process, not inherited by workers: they may outlive one that was killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise HeldError(holder or "another process") from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # it has no such call for folders
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

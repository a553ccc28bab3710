"""Checkpoints that are whole or absent: safetensors and one JSON each, no pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gld_zoo.hub import save_tensors
from gld_zoo.training.common.disk import replace_folder, sha256, writing
from gld_zoo.training.common.errors import CheckpointError, DiskError


def save_checkpoint(
    folder: Path,
    name: str,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write one checkpoint; drop all but the `keep` newest, and what an earlier crash left.

    Everything is written and flushed under a temporary name and renamed last, so a crash at any
    moment leaves the earlier checkpoints alone.

    Args:
        folder: The run's checkpoint folder.
        name: Of the checkpoint; names sort by age.
        tensors: File stem to tensors by name.
        state: What else to keep, as JSON.
        keep: Checkpoints to leave in the folder.

    Raises:
        DiskError: If the disk refuses; the earlier checkpoints are untouched.
    """
    temporary = folder / f".{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder / name):
        try:
            _write(temporary, tensors, state)
            replace_folder(temporary, folder / name)
        except (OSError, SafetensorError):
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in list_checkpoints(folder)[:-keep]:
            old.rename(folder / f".{old.name}.partial")  # never half a checkpoint by its name
        for old in folder.glob(".*.partial"):
            shutil.rmtree(old)


def _write(
    folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> None:
    folder.mkdir(parents=True)
    for stem, group in tensors.items():
        save_tensors(group, folder / f"{stem}.safetensors")
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    text = json.dumps(dict(state, sha256=hashes, state_sha256=_digest(state)), indent=2)
    (folder / "state.json").write_text(text, encoding="utf-8")


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read and verify one checkpoint.

    Returns:
        Tensors by file stem, and the state.

    Raises:
        CheckpointError: If a file is missing or not what was written.
        DiskError: If the disk does not give what it holds.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        hashes, digest = state.pop("sha256"), state.pop("state_sha256")
        damaged = [name for name, expected in hashes.items() if sha256(path / name) != expected]
        if _digest(state) != digest:
            damaged.append("state.json")
        if damaged:
            raise CheckpointError(
                f"{path} is damaged: {', '.join(damaged)} changed since it was written"
            )
        tensors = {Path(name).stem: load_file(path / name) for name in hashes}
    except (
        FileNotFoundError,
        KeyError,
        AttributeError,
        TypeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    except OSError as error:  # it may pass: no reason to give a checkpoint up
        raise DiskError(f"cannot read {path}: {error.strerror}; nothing was changed") from error
    return tensors, state

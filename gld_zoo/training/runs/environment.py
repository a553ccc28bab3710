"""What a reader needs to judge and repeat a run: command, commit, versions, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import gld_zoo


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what a reader needs to judge and repeat a run."""
    names = ("gld-zoo", "torch", "torchvision", "timm", "accelerate", "datasets")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = accelerator.device
    gpu = _describe_gpus() if device.type == "cuda" else {}
    return dict(
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
        commit=_commit(),
        python=platform.python_version(),
        versions=versions,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processor=f"{platform.machine()}, {os.cpu_count()} cores",
        processes=accelerator.num_processes,
        threads=torch.get_num_threads(),
        mixed_precision=accelerator.mixed_precision,
        **gpu,
    )


def _describe_gpus() -> dict[str, Any]:
    """Return the versions that a GPU's results depend on, and how many there are."""
    try:
        driver = subprocess.check_output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            text=True,
            stderr=subprocess.DEVNULL,
        ).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return dict(
        gpus=torch.cuda.device_count(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        driver=driver,
    )


def changed_environment(first: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what decides the bits of a result and is not as it was: its name, was, is."""
    names = ["processes", "mixed_precision", "device", "threads", "python", "commit"]
    names += ["cuda", "cudnn", "driver"]
    pairs = [(name, first.get(name), now.get(name)) for name in names]
    earlier = first.get("versions", {})
    pairs += [(name, earlier.get(name), version) for name, version in now["versions"].items()]
    return [(name, was, value) for name, was, value in pairs if was != value]


def _commit() -> str | None:
    """Return the commit of the checkout that the package lies in, or of an installed one None.

    That may lie in a repository of other things, as an environment in a project does.
    """
    checkout = Path(gld_zoo.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"],
            cwd=checkout,
            text=True,
            stderr=subprocess.DEVNULL,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None

"""What a model refuses of the images it would get, told before any is read."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from gld_zoo.training.common.errors import ModelError


@contextlib.contextmanager
def refusals(
    name: str, size: int, remedy: str = "choose another, or another image_size"
) -> Iterator[None]:
    """Without gradients, turn what a model refuses of square images into a `ModelError`.

    Args:
        name: What the error calls the model.
        size: Side of the images in pixels.
        remedy: What the error advises.

    Raises:
        ModelError: If it refuses.
    """
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError:  # which is no fault of the size
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{name} cannot take {size}x{size} images: {error}; {remedy}") from error


def check_lone_image(
    network: nn.Module, image: torch.Tensor, *, name: str, batch_size: int, processes: int
) -> None:
    """Refuse a module that cannot train on one image, as batch norm cannot on a map of 1x1.

    A copy is shown it, and what that draws is taken back, so that nothing of the run moves.

    Args:
        network: In the mode in which it trains.
        image: One, `[1, 3, H, W]`.
        name: What the error calls it.
        batch_size: Of all processes.
        processes: How many there are.

    Raises:
        ModelError: If it refuses.
    """
    devices = [image.device] if image.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            copy.deepcopy(network)(image)
    except ValueError as error:
        height, width = image.shape[-2:]
        raise ModelError(
            f"batch_size={batch_size} leaves a process one image, on which {name} cannot train at "
            f"{width}x{height} ({error}), as batch norm needs two values a channel; use "
            f"batch_size={2 * processes} or more"
        ) from error


def check_takes(name: str, model: Any, size: int, device: torch.device) -> None:
    """Refuse a size of images that a model cannot take before they are read.

    Raises:
        ModelError: If it cannot.
    """
    with refusals(f"model {name!r}", size):
        model(torch.zeros(1, 3, size, size, device=device))

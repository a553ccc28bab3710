"""Batch norm folded into the convolution before it: the same logits in eval mode, less work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Pair = tuple[nn.Module, str, str]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold batch norm into convolutions where it directly follows one, in place.

    Only in a model that tells which of its layers follow each other, as this package's do by
    `convs_and_norms`, names by type of module; any other is left as it is. The model can no longer
    be trained; logits stay within float32 rounding.

    Args:
        model: A model in eval mode.

    Returns:
        The model.

    Raises:
        ValueError: If the model is in training mode, where batch norm uses the batch's statistics.
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    told = getattr(model, "convs_and_norms", None)
    if told is not None:
        for owner, conv, norm in list(_pairs(model, told)):
            fused = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
            setattr(owner, conv, fused)
            setattr(owner, norm, nn.Identity())
    return model


def _pairs(model: nn.Module, told: dict[type, tuple[tuple[str, str], ...]]) -> Iterator[Pair]:
    """Yield each module that applies a batch norm right after a convolution, with their names."""
    for module in model.modules():
        pairs = [pair for kind, own in told.items() if isinstance(module, kind) for pair in own]
        if isinstance(module, nn.Sequential):  # stems and shortcuts
            pairs += pairwise(name for name, _ in module.named_children())
        for conv, norm in pairs:
            if type(getattr(module, conv)) is nn.Conv2d and (
                type(getattr(module, norm)) is nn.BatchNorm2d
            ):
                yield module, conv, norm

"""Batch norm folded into the convolution before it: the same logits in eval mode, less work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn as nn
from timm.models.resnet import BasicBlock
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gld_zoo.models._cifar import CifarNet
from gld_zoo.models.cifar_wrn import PreActBlock
from gld_zoo.models.gld_resnet import GLDResNet

Pair = tuple[nn.Module, str, str]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold batch norm into convolutions where it directly follows one, in place.

    Only in this package's own families, whose order of layers is known here; any other model is
    left as it is. The model can no longer be trained; logits stay within float32 rounding.

    Args:
        model: A model in eval mode.

    Returns:
        The model.

    Raises:
        ValueError: If the model is in training mode, where batch norm uses the batch's statistics.
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    if isinstance(model, (CifarNet, GLDResNet)):
        for owner, conv, norm in list(_pairs(model)):
            fused = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
            setattr(owner, conv, fused)
            setattr(owner, norm, nn.Identity())
    return model


def _pairs(model: nn.Module) -> Iterator[Pair]:
    """Yield each module that applies a batch norm right after a convolution, with their names."""
    for module in model.modules():
        if isinstance(module, GLDResNet):
            candidates = [("conv1", "bn1")]
        elif isinstance(module, BasicBlock):
            candidates = [("conv1", "bn1"), ("conv2", "bn2")]
        elif isinstance(module, PreActBlock):
            candidates = [("conv1", "bn2")]
        elif isinstance(module, nn.Sequential):  # stems and shortcuts
            names = [name for name, _ in module.named_children()]
            candidates = list(pairwise(names))
        else:
            continue
        for conv, norm in candidates:
            if type(getattr(module, conv)) is nn.Conv2d and (
                type(getattr(module, norm)) is nn.BatchNorm2d
            ):
                yield module, conv, norm

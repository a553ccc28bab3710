"""Batch norm folded into the convolution before it: the same logits in eval mode, less work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # that multiply by their weight as it is
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
TOLERANCE = 1e-4  # of how far logits lie from their mean, in float32; right folds move them by 1e-6

Place = tuple[nn.Module, str]


@torch.no_grad()
def fold_batch_norm(model: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Fold each batch norm into the convolution whose output it takes, in place.

    Folded are those that are children of one module. Which they are is seen on noise, and the
    logits are compared with those of before: a model whose logits move, as where something else
    takes such an output too, is left as it was, and so is one that raises. A folded one can no
    longer be trained; its logits stay within float32 rounding.

    Args:
        model: A model in eval mode.
        input_size: Channels, height and width of images that it takes.

    Returns:
        The model.

    Raises:
        ValueError: If batch norm is in training mode, where it uses the batch's statistics.
    """
    norms = [module for module in model.modules() if type(module) in NORMS]
    if model.training or any(norm.training for norm in norms):
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    if not norms:
        return model
    noise = torch.randn((2, *input_size), generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()))
    expected, pairs = _observe(model, noise)
    before = {place: getattr(*place) for pair in pairs for place in pair}
    agree = False
    try:
        for conv, norm in pairs:
            setattr(*conv, fuse_conv_bn_eval(before[conv], before[norm]))
            setattr(*norm, _without_norm(before[norm]))
        moved = (model(noise) - expected).abs().max()
        agree = bool(moved <= TOLERANCE * (expected - expected.mean()).abs().max())
    finally:
        if not agree:
            for place, module in before.items():
                setattr(*place, module)
    return model


def _observe(model: nn.Module, images: torch.Tensor) -> tuple[Any, list[tuple[Place, Place]]]:
    """Return a model's logits, and the places of each pair of a convolution and its norm."""
    outputs: dict[int, tuple[Place, torch.Tensor, int]] = {}
    pairs: list[tuple[Place, Place]] = []
    hooks = []

    def watch(place: Place, module: nn.Module) -> None:
        def produced(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            outputs[id(output)] = (place, output, output._version)

        def taken(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if found := outputs.get(id(args[0])):
                conv, output, version = found
                # a shortcut may have been added to it in place since
                if conv[0] is place[0] and output._version == version:
                    pairs.append((conv, place))

        if type(module) in CONVOLUTIONS:
            hooks.append(module.register_forward_hook(produced))
        elif type(module) in NORMS and getattr(module, "running_mean", None) is not None:
            hooks.append(module.register_forward_pre_hook(taken))

    try:
        for owner in model.modules():
            for name, module in owner.named_children():
                watch((owner, name), module)
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, pairs


def _without_norm(norm: Any) -> nn.Module:
    """Return what is left of a batch norm that was folded: nothing, or its activation."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity().eval()
    return nn.Sequential(norm.drop, norm.act).eval()

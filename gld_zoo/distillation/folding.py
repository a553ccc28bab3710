"""Batch norm folded into the convolution before it: the same logits in eval mode, less work."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # that multiply by their weight as it is
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
TOLERANCE = 1e-3  # of the largest logit, in float32

Place = tuple[nn.Module, str]


@torch.no_grad()
def fold_batch_norm(model: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Fold each batch norm into the convolution beside it whose output it takes, in place.

    Which those are is seen on noise, and the logits are compared: a model whose logits move, as
    where something else takes that output too, is left as it was. A folded one can no longer be
    trained; its logits stay within float32 rounding.

    Args:
        model: A model in eval mode, in float32.
        input_size: Channels, height and width of images that it takes.

    Returns:
        The model.

    Raises:
        ValueError: If the model is in training mode, where batch norm uses the batch's statistics.
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    if not any(type(module) in NORMS for module in model.modules()):
        return model
    noise = torch.randn((2, *input_size), generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    expected, pairs = _observe(model, noise)
    before = {place: getattr(*place) for pair in pairs for place in pair}
    for conv, norm in pairs:
        setattr(*conv, fuse_conv_bn_eval(before[conv], before[norm]))
        setattr(*norm, _without_norm(before[norm]))
    moved = (model(noise) - expected).abs().max()
    if not moved <= TOLERANCE * expected.abs().max():  # nor is what is no number
        for place, module in before.items():
            setattr(*place, module)
    return model


def _observe(model: nn.Module, images: torch.Tensor) -> tuple[Any, list[tuple[Place, Place]]]:
    """Return a model's logits, and the places of each pair of a convolution and its norm."""
    outputs: dict[int, tuple[Place, torch.Tensor, int]] = {}
    pairs: list[tuple[Place, Place]] = []
    calls: Counter[Place] = Counter()
    hooks = []

    def watch(place: Place, module: nn.Module) -> None:
        def produced(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            calls[place] += 1
            outputs[id(output)] = (place, output, output._version)

        def taken(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            calls[place] += 1
            conv, output, version = outputs.get(id(args[0]), (place, args[0], None))
            # a shortcut may have been added to it in place since
            if conv[0] is place[0] and output._version == version:
                pairs.append((conv, place))

        if type(module) in CONVOLUTIONS:
            hooks.append(module.register_forward_hook(produced))
        elif getattr(module, "running_mean", None) is not None:
            hooks.append(module.register_forward_pre_hook(taken))

    places = [(owner, name) for owner in model.modules() for name, _ in owner.named_children()]
    times = Counter(getattr(*place) for place in places)
    for place in places:
        module = getattr(*place)
        if times[module] == 1 and type(module) in (*CONVOLUTIONS, *NORMS):
            watch(place, module)
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, [pair for pair in pairs if all(calls[place] == 1 for place in pair)]


def _without_norm(norm: Any) -> nn.Module:
    """Return what is left of a batch norm that was folded: nothing, or its activation."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    return nn.Sequential(norm.drop, norm.act)

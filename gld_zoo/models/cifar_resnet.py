"""ResNet for 32 x 32 images.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, section
4.2: a 3 x 3 stem, three stages of 16, 32 and 64 channels, depth 6n + 2. Shortcuts that change shape
are 1 x 1 projections, as in GLD (ICCV 2021). The blocks are timm's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv

from gld_zoo.models._cifar import CifarNet, StagePlan, cifar_cfg, plan_stages

__all__ = ["CifarResNet"]


def _stage(in_chs: int, out_chs: int, blocks: int, plan: StagePlan, **dd: Any) -> nn.Sequential:
    downsample = None
    if plan.stride != 1 or in_chs != out_chs:
        downsample = downsample_conv(in_chs, out_chs, kernel_size=1, stride=plan.stride, **dd)
    first = BasicBlock(
        in_chs,
        out_chs,
        plan.stride,
        downsample,
        dilation=plan.dilation,
        first_dilation=plan.first_dilation,
        **dd,
    )
    return nn.Sequential(
        first,
        *(BasicBlock(out_chs, out_chs, dilation=plan.dilation, **dd) for _ in range(blocks - 1)),
    )


class CifarResNet(CifarNet):
    """ResNet for 32 x 32 images; `forward` maps `[B, in_chans, H, W]` to `[B, K]`.

    Args:
        depth: Layers, 6n + 2.
        widths: Channels of the three stages.
        output_stride: Stride of the last feature map, 1, 2 or 4; smaller ones dilate instead.
        num_classes, in_chans, global_pool, drop_rate: As in every timm model.

    Raises:
        ValueError: If `depth` is not 6n + 2 or `output_stride` not 1, 2 or 4.
    """

    def __init__(
        self,
        depth: int = 20,
        widths: tuple[int, int, int] = (16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        output_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2; use 20, 32, 44, 56 or 110")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False, **dd),
                bn=nn.BatchNorm2d(widths[0], **dd),
                act=nn.ReLU(inplace=True),
            )
        )
        plans = plan_stages(output_stride)
        inputs = (widths[0], *widths[:2])
        super().__init__(
            stem,
            [
                _stage(i, o, (depth - 2) // 6, plan, **dd)
                for i, o, plan in zip(inputs, widths, plans, strict=True)
            ],
            nn.Identity(),
            widths=widths,
            reductions=tuple(plan.reduction for plan in plans),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2)), **kwargs
    )


def _cfg(weights: str = "", **kwargs: Any) -> dict[str, Any]:
    return cifar_cfg(weights, paper_ids="arXiv:1512.03385", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "gld_resnet20.gldplus_cifar100": _cfg("gld_resnet20.gldplus_cifar100"),
        "gld_resnet20.r110_cifar100": _cfg("gld_resnet20.r110_cifar100"),
        "gld_resnet20.ce_cifar100": _cfg("gld_resnet20.ce_cifar100"),
        "gld_resnet32.untrained": _cfg(),
        "gld_resnet44.untrained": _cfg(),
        "gld_resnet56.untrained": _cfg(),
        "gld_resnet110.ce_restarted_cifar100": _cfg("gld_resnet110.ce_restarted_cifar100"),
        "gld_resnet110.ce_cifar100": _cfg("gld_resnet110.ce_cifar100"),
    }
)


@register_model
def gld_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-20 for 32 x 32 images, 0.28M parameters; student of the paper's setup (a)."""
    return _create_cifar_resnet("gld_resnet20", pretrained, **dict(dict(depth=20), **kwargs))


@register_model
def gld_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-32 for 32 x 32 images, 0.47M parameters; student of the paper's setup (d)."""
    return _create_cifar_resnet("gld_resnet32", pretrained, **dict(dict(depth=32), **kwargs))


@register_model
def gld_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-44 for 32 x 32 images, 0.67M parameters."""
    return _create_cifar_resnet("gld_resnet44", pretrained, **dict(dict(depth=44), **kwargs))


@register_model
def gld_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-56 for 32 x 32 images, 0.86M parameters."""
    return _create_cifar_resnet("gld_resnet56", pretrained, **dict(dict(depth=56), **kwargs))


@register_model
def gld_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-110 for 32 x 32 images, 1.74M parameters; teacher of the paper's setup (a)."""
    return _create_cifar_resnet("gld_resnet110", pretrained, **dict(dict(depth=110), **kwargs))

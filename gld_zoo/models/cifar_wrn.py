"""Wide ResNet for 32 x 32 images.

Zagoruyko and Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146: pre-activation
blocks, three stages of 16k, 32k and 64k channels, depth 6n + 4, no dropout inside the blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from gld_zoo.models._cifar import CifarNet, StagePlan, cifar_cfg, plan_stages

__all__ = ["CifarWideResNet"]


class PreActBlock(nn.Module):
    """Pre-activation block; a shortcut that changes shape starts after the first activation."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(
            in_chs,
            out_chs,
            3,
            stride=stride,
            padding=first_dilation,
            dilation=first_dilation,
            bias=False,
            **dd,
        )
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(
            out_chs, out_chs, 3, padding=dilation, dilation=dilation, bias=False, **dd
        )
        self.downsample = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, H, W]` to `[B, C', H/stride, W/stride]`."""
        shortcut = x
        x = self.act1(self.bn1(x))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.act2(self.bn2(x))
        x = self.conv2(x)
        x += shortcut
        return x


def _stage(in_chs: int, out_chs: int, blocks: int, plan: StagePlan, **dd: Any) -> nn.Sequential:
    first = PreActBlock(in_chs, out_chs, plan.stride, plan.dilation, plan.first_dilation, **dd)
    rest = (
        PreActBlock(out_chs, out_chs, 1, plan.dilation, plan.dilation, **dd)
        for _ in range(blocks - 1)
    )
    return nn.Sequential(first, *rest)


class CifarWideResNet(CifarNet):
    """Wide ResNet for 32 x 32 images; `forward` maps `[B, in_chans, H, W]` to `[B, K]`.

    Args:
        depth: Layers, 6n + 4.
        width: The factor k on 16, 32 and 64 channels.
        output_stride: Stride of the last feature map, 1, 2 or 4; smaller ones dilate instead.
        num_classes, in_chans, global_pool, drop_rate: As in every timm model.

    Raises:
        ValueError: If `depth` is not 6n + 4 or `output_stride` not 1, 2 or 4.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 1,
        num_classes: int = 100,
        in_chans: int = 3,
        output_stride: int = 4,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} is not 6n + 4; use 16 or 22")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        stem = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd))
        )
        plans = plan_stages(output_stride)
        widths = (16 * width, 32 * width, 64 * width)
        inputs = (16, *widths[:2])
        super().__init__(
            stem,
            [
                _stage(i, o, (depth - 4) // 6, plan, **dd)
                for i, o, plan in zip(inputs, widths, plans, strict=True)
            ],
            nn.Sequential(
                OrderedDict(bn=nn.BatchNorm2d(widths[2], **dd), act=nn.ReLU(inplace=True))
            ),
            widths=widths,
            reductions=tuple(plan.reduction for plan in plans),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _create_cifar_wrn(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    return build_model_with_cfg(
        CifarWideResNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2)), **kwargs
    )


def _cfg(weights: str = "", **kwargs: Any) -> dict[str, Any]:
    return cifar_cfg(weights, paper_ids="arXiv:1605.07146", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "gld_wrn16_1.gldplus_cifar100": _cfg("gld_wrn16_1.gldplus_cifar100"),
        "gld_wrn16_1.wrn16_2_cifar100": _cfg("gld_wrn16_1.wrn16_2_cifar100"),
        "gld_wrn16_1.ce_cifar100": _cfg("gld_wrn16_1.ce_cifar100"),
        "gld_wrn16_2.ce_cifar100": _cfg("gld_wrn16_2.ce_cifar100"),
        "gld_wrn16_4.untrained": _cfg(),
        "gld_wrn22_4.untrained": _cfg(),
    }
)


@register_model
def gld_wrn16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """Build WRN-16-1, 0.18M parameters; student of the paper's setup (b)."""
    return _create_cifar_wrn("gld_wrn16_1", pretrained, **dict(dict(depth=16, width=1), **kwargs))


@register_model
def gld_wrn16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """Build WRN-16-2, 0.70M parameters; teacher of setup (b), student of setup (c)."""
    return _create_cifar_wrn("gld_wrn16_2", pretrained, **dict(dict(depth=16, width=2), **kwargs))


@register_model
def gld_wrn16_4(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """Build WRN-16-4, 2.77M parameters; teacher of the paper's setup (d)."""
    return _create_cifar_wrn("gld_wrn16_4", pretrained, **dict(dict(depth=16, width=4), **kwargs))


@register_model
def gld_wrn22_4(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """Build WRN-22-4, 4.32M parameters; teacher of the paper's setup (c)."""
    return _create_cifar_wrn("gld_wrn22_4", pretrained, **dict(dict(depth=22, width=4), **kwargs))

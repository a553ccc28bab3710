"""ResNet-18 and ResNet-34: timm's own, with local logits.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385.
State-dict keys are those of timm's `resnet18` and `resnet34`, so their weights load unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from gld_zoo.distillation.heads import LocalLogits
from gld_zoo.models._weights import CIFAR100_LABELS, embedded

__all__ = ["GLDResNet"]


class GLDResNet(LocalLogits, ResNet):
    """timm's ResNet with `forward_logits`; `forward` maps `[B, in_chans, H, W]` to `[B, K]`."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters to keep out of weight decay: none, the paper decays them all."""
        return set()


def _create_gld_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GLDResNet:
    # timm zeroes the last norm of each block by default; the paper's networks start from plain He
    # initialisation
    model_args = dict(block=BasicBlock, zero_init_last=False)
    return build_model_with_cfg(GLDResNet, variant, pretrained, **dict(model_args, **kwargs))


def _cfg(weights: str = "", **kwargs: Any) -> dict[str, Any]:
    cfg = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bilinear",
        first_conv="conv1",
        classifier="fc",
        license="apache-2.0",
        paper_ids="arXiv:1512.03385",
    )
    return dict(cfg, **embedded(weights), **kwargs)


def _cifar100_cfg(weights: str) -> dict[str, Any]:
    # CIFAR-100 resized to 64 x 64, with ImageNet's mean and deviation
    sizes = dict(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0)
    return _cfg(weights, num_classes=100, label_names=CIFAR100_LABELS, **sizes)


default_cfgs = generate_default_cfgs(
    {
        "gld_resnet18.gldplus_cifar100": _cifar100_cfg("gld_resnet18.gldplus_cifar100"),
        "gld_resnet34.untrained": _cfg(),
    }
)


@register_model
def gld_resnet18(pretrained: bool = False, **kwargs: Any) -> GLDResNet:
    """Build ResNet-18, 11.2M parameters with 100 classes; the paper's larger student."""
    return _create_gld_resnet(
        "gld_resnet18", pretrained, **dict(dict(layers=(2, 2, 2, 2)), **kwargs)
    )


@register_model
def gld_resnet34(pretrained: bool = False, **kwargs: Any) -> GLDResNet:
    """Build ResNet-34, 21.8M parameters with 1000 classes; the paper's larger teacher."""
    return _create_gld_resnet(
        "gld_resnet34", pretrained, **dict(dict(layers=(3, 4, 6, 3)), **kwargs)
    )

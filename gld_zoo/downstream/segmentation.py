"""DeepLabV3+ on a timm backbone, the segmenter of the paper's transfer experiment.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", ECCV 2018, with plain convolutions as the paper's parameter counts say.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from gld_zoo.downstream.saving import create_backbone

RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # of dilation, by output stride
WIDTH = 256
LOW_WIDTH = 48


class DeepLabV3Plus(nn.Module):
    """Atrous pyramid over the deepest map, refined by the map at stride 4.

    Args:
        backbone: Images to two maps, at stride 4 and at the output stride.
        channels: Of each.
        rates: Of the pyramid's dilated convolutions.
        num_classes: Channels of the logits.
    """

    config: dict[str, Any]  # how it was made, and its class names once it was saved

    def __init__(
        self, backbone: nn.Module, channels: list[int], rates: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        low, deep = channels
        self.backbone = backbone
        self.aspp = ASPP(deep, list(rates), WIDTH)
        self.low = nn.Sequential(*_conv_bn_relu(low, LOW_WIDTH, 1))
        self.decoder = nn.Sequential(
            *_conv_bn_relu(WIDTH + LOW_WIDTH, WIDTH, 3), *_conv_bn_relu(WIDTH, WIDTH, 3)
        )
        self.classifier = nn.Conv2d(WIDTH, num_classes, 1)
        for part in (self.aspp, self.low, self.decoder):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images `[B, 3, H, W]` to logits `[B, num_classes, H, W]`."""
        low, deep = self.backbone(images)
        context = _resize(self.aspp(deep), low)
        refined = self.decoder(torch.cat([context, self.low(low)], dim=1))
        return _resize(self.classifier(refined), images)


def _conv_bn_relu(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _resize(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


def create_deeplabv3plus(
    backbone: str = "gld_resnet18",
    num_classes: int = 21,
    output_stride: int = 16,
    *,
    pretrained_backbone: bool = True,
    backbone_options: dict[str, Any] | None = None,
) -> DeepLabV3Plus:
    """Build DeepLabV3+: normalised images `[B, 3, H, W]` to logits `[B, num_classes, H, W]`.

    In training its image-level pooling needs at least two images a batch, for batch norm.

    Args:
        backbone: Any timm model with maps at strides 4 and 32 that can be dilated.
        num_classes: With the background, where the data has one.
        output_stride: Of the deepest map, 16 or 8; at 8 the pyramid's rates are doubled.
        pretrained_backbone: Load the backbone's weights.
        backbone_options: For `timm.create_model`.

    Raises:
        ValueError: If the backbone cannot be had or cannot be dilated, or for another stride.
    """
    if output_stride not in RATES:
        raise ValueError(f"output_stride={output_stride} is not 16 or 8")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    options = dict(backbone_options or {}, output_stride=output_stride)
    body, again = create_backbone(backbone, (4, 32), pretrained=pretrained_backbone, **options)
    model = DeepLabV3Plus(body, body.feature_info.channels(), RATES[output_stride], num_classes)
    model.config = dict(
        factory="create_deeplabv3plus",
        num_classes=num_classes,
        output_stride=output_stride,
        **again,
    )
    return model

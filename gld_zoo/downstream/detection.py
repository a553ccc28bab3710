"""SSD300 on a timm backbone, the detector of the paper's transfer experiment.

Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016; torchvision's implementation.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from gld_zoo.downstream.saving import create_backbone

SIZE = 300
STRIDES = (8, 16, 32)
MAPS = (38, 19, 10, 5, 3, 1)


class SSDFeatures(nn.Module):
    """A backbone's maps at strides 8, 16 and 32, and three more of ever coarser positions.

    The paper does not give its extra layers; these are SSD300's own last three: 1 x 1 and 3 x 3
    convolutions with a bias and ReLU, without batch norm.

    Args:
        body: Images to three maps.
        channels: Of each.
    """

    def __init__(self, body: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.body = body
        self.extra = nn.ModuleList(
            [
                _shrink(channels[-1], 256, 512, stride=2, padding=1),
                _shrink(512, 128, 256, stride=1, padding=0),
                _shrink(256, 128, 256, stride=1, padding=0),
            ]
        )
        self.out_channels = [*channels, 512, 256, 256]

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Map images `[B, 3, 300, 300]` to maps of side 38, 19, 10, 5, 3 and 1."""
        maps = list(self.body(images))
        for layers in self.extra:
            maps.append(layers(maps[-1]))
        return OrderedDict((str(i), one) for i, one in enumerate(maps))


def _shrink(inputs: int, hidden: int, outputs: int, *, stride: int, padding: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(inputs, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 3, stride=stride, padding=padding),
        nn.ReLU(inplace=True),
    )
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.constant_(cast(torch.Tensor, layer.bias), 0)
    return layers


def create_ssd300(
    backbone: str = "gld_resnet18",
    num_classes: int = 21,
    pretrained_backbone: bool = True,
    *,
    backbone_options: dict[str, Any] | None = None,
) -> SSD:
    """Build SSD300: torchvision's `SSD`, with its inputs, outputs and losses.

    In training it takes images and targets (`boxes` `[N, 4]` as x1, y1, x2, y2 in pixels, `labels`
    `[N]` from 1) and returns `bbox_regression` and `classification`; in eval mode it takes images
    alone and returns for each `boxes`, `labels` and `scores`. Images are `[3, H, W]` from 0 to 1,
    of any size; they are resized to 300 x 300 and normalised inside.

    Args:
        backbone: Any timm model with maps at strides 8, 16 and 32.
        num_classes: With the background, which is class 0.
        pretrained_backbone: Load the backbone's weights.
        backbone_options: For `timm.create_model`.

    Raises:
        ValueError: If the backbone cannot be had or does not have such maps.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} leaves no class beside the background")
    body, again = create_backbone(
        backbone, STRIDES, pretrained=pretrained_backbone, **backbone_options or {}
    )
    features = SSDFeatures(body, body.feature_info.channels())
    _check_maps(backbone, features)
    config = resolve_model_data_config(body)
    boxes = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    model = SSD(
        features,
        boxes,
        (SIZE, SIZE),
        num_classes,
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
        nms_thresh=0.45,
        score_thresh=0.01,
    )
    # what a folder to load from must hold
    model.config = dict(factory="create_ssd300", num_classes=num_classes, **again)
    return model


class DenseSSD(nn.Module):
    """The part of SSD300 that exports: all but resizing, decoding and suppression.

    Args:
        model: From `create_ssd300`.
    """

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model
        mean, std = (
            torch.tensor(value)[:, None, None]
            for value in (model.transform.image_mean, model.transform.image_std)
        )
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images `[B, 3, 300, 300]` from 0 to 1 to box offsets and logits of all 8,732 boxes.

        Returns:
            Offsets `[B, 8732, 4]` and class logits `[B, 8732, num_classes]`.
        """
        maps = self.model.backbone((images - self.mean) / self.std)
        dense = self.model.head(list(maps.values()))
        return dense["bbox_regression"], dense["cls_logits"]

    def decode(
        self, offsets: torch.Tensor, logits: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Turn `forward`'s output into the model's detections.

        Args:
            offsets: `[B, 8732, 4]`, as `forward` returns them.
            logits: `[B, 8732, num_classes]`, the same.
            sizes: Height and width of each original image, in pixels.

        Returns:
            For each image `boxes` in its pixels, `labels` and `scores`.
        """
        inside = [(SIZE, SIZE)] * len(sizes)
        images = ImageList(offsets.new_zeros(len(sizes), 3, SIZE, SIZE), inside)
        maps = [offsets.new_zeros(len(sizes), 1, side, side) for side in MAPS]
        boxes = self.model.anchor_generator(images, maps)
        dense = dict(bbox_regression=offsets, cls_logits=logits)
        found = self.model.postprocess_detections(dense, boxes, inside)
        return self.model.transform.postprocess(found, inside, sizes)


@torch.no_grad()
def _check_maps(backbone: str, features: SSDFeatures) -> None:
    features.eval()
    try:
        maps = features(torch.zeros(1, 3, SIZE, SIZE)).values()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"backbone={backbone!r} cannot take 300 x 300 images ({error}); take one of any image "
            "size, such as gld_resnet18"
        ) from error
    features.train()
    sides = tuple(one.shape[-1] for one in maps)
    if sides != MAPS:
        raise ValueError(
            f"backbone={backbone!r} gives maps of side {sides} for 300 x 300 images, not {MAPS}; "
            "take one that pads its strided layers, such as gld_resnet18"
        )

"""Drawings of what a detector or a segmenter finds in an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.data import resolve_model_data_config
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from gld_zoo.fonts import drawable
from gld_zoo.training.data.batches import Normalize
from gld_zoo.training.data.segmentation_rows import MeasuringTransform

CPU = torch.device("cpu")


@torch.no_grad()
def draw_boxes(model: Any, image: torch.Tensor, threshold: float) -> tuple[torch.Tensor, str]:
    """Draw the boxes of an image uint8 `[3, H, W]`; return it and a line that lists them."""
    (found,) = model([image / 255])
    keep = found["scores"] >= threshold
    labels, scores = found["labels"][keep].tolist(), found["scores"][keep].tolist()
    names = [
        f"{model.config['label_names'][label - 1]} {score:.0%}"
        for label, score in zip(labels, scores, strict=True)
    ]
    if not names:
        return image, "nothing"
    boxes, colors = found["boxes"][keep], [_color(label) for label in labels]
    picture = v2.functional.to_pil_image(draw_bounding_boxes(image, boxes, colors=colors, width=2))
    pen = ImageDraw.Draw(picture)
    # the surest last, over the others
    for name, color, (x, y, *_) in reversed(list(zip(names, colors, boxes.tolist(), strict=True))):
        name, font = drawable(name, 11)
        pen.rectangle(pen.textbbox((x + 3, y), name, font=font), fill=color)
        pen.text((x + 3, y), name, fill="white", font=font)
    return v2.functional.pil_to_tensor(picture), ", ".join(names)


@torch.no_grad()
def draw_mask(model: Any, image: torch.Tensor, size: int) -> tuple[torch.Tensor, str]:
    """Colour an image uint8 `[3, H, W]` by class; return it and the share of each class.

    Args:
        model: From `load_downstream`.
        image: The image.
        size: Longer side in pixels at which the model sees it.
    """
    config = resolve_model_data_config(model.backbone)
    normalize = Normalize(config["mean"], config["std"], CPU)
    small, _ = MeasuringTransform(size)(image, image)
    logits = model(normalize(small.permute(1, 2, 0)[None]))
    classes = F.interpolate(
        logits, size=image.shape[-2:], mode="bilinear", align_corners=False
    ).argmax(1)[0]
    names = model.config["label_names"]
    masks = torch.stack([classes == i for i in range(len(names))])
    colors = [_color(i) for i in range(len(names))]
    drawn = draw_segmentation_masks(image, masks, alpha=0.55, colors=colors)
    shares = masks.flatten(1).float().mean(1)
    order = [i for i in shares.argsort(descending=True).tolist() if shares[i] > 0]
    return _with_key(drawn, [(names[i], colors[i]) for i in order]), ", ".join(
        f"{names[i]} {shares[i]:.0%}" for i in order
    )


def _with_key(image: torch.Tensor, entries: list[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
    """Put the classes' colours and names to the right of an image."""
    line = 16
    height = max(image.shape[1], line * len(entries) + 4)
    canvas = torch.full((3, height, image.shape[2] + 110), 255, dtype=torch.uint8)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    picture = v2.functional.to_pil_image(canvas)
    pen, left = ImageDraw.Draw(picture), image.shape[2] + 6
    for i, (name, color) in enumerate(entries):
        top = 4 + i * line
        pen.rectangle((left, top, left + 10, top + 10), fill=color)
        name, font = drawable(name, 10)
        pen.text((left + 16, top - 2), name, fill="black", font=font)
    return v2.functional.pil_to_tensor(picture)


def _color(label: int) -> tuple[int, int, int]:
    """Return a class's colour: hues a golden angle apart, every other eight of them darker."""
    hue, value = int(255 * (label * 0.618034 % 1)), (235, 140)[label // 8 % 2]
    red, green, blue = Image.new("HSV", (1, 1), (hue, 200, value)).convert("RGB").tobytes()
    return red, green, blue

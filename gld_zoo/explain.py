"""A picture of what a model sees where: the class of each cell, and the activation map."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

from gld_zoo.fonts import drawable

SIDE = 320  # pixels of each of the two panels
HEAD = 28
# dark blue to yellow, with even steps of lightness
COLOURS = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def explain(image: Image.Image, labels: Sequence[str], activation: torch.Tensor) -> Image.Image:
    """Draw an image with its cells' labels, beside the activation map over it.

    Args:
        image: RGB, the part of it that the model saw.
        labels: 1 + grid² texts: of the whole image, then of the cells row by row.
        activation: `[H, W]`, scaled from its smallest value to its largest.

    Returns:
        RGB, two square panels side by side below a line of text.
    """
    grid = round((len(labels) - 1) ** 0.5)
    picture = Image.new("RGB", (2 * SIDE, SIDE + HEAD), "white")
    square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    white, grey = Image.new("RGB", square.size, "white"), square.convert("L").convert("RGB")
    picture.paste(Image.blend(square, white, 0.25), (0, HEAD))
    picture.paste(Image.blend(grey, _heat(activation), 0.6), (SIDE, HEAD))
    draw = ImageDraw.Draw(picture)
    text, head = drawable(f"whole image: {labels[0].replace('_', ' ')}", 15)
    draw.text((6, 5), text, "black", font=head)
    text, head = drawable("largest activation", 15)
    draw.text((SIDE + 6, 5), text, "black", font=head)
    cell = SIDE / grid
    for line in range(1, grid):
        at = line * cell
        draw.line([(at, HEAD), (at, HEAD + SIDE)], "white", 2)
        draw.line([(0, HEAD + at), (SIDE, HEAD + at)], "white", 2)
    size = max(8, min(16, int(cell / 7)))
    for number, label in enumerate(labels[1:]):
        y, x = divmod(number, grid)
        text, font = drawable(label.replace("_", " "), size)
        words = text.rpartition(" ")
        draw.multiline_text(
            ((x + 0.5) * cell, HEAD + (y + 0.5) * cell),
            # escapes may be longer than a cell is wide
            f"{textwrap.fill(words[0], int(cell / font.getlength('0')) or 1)}\n{words[2]}",
            "black",
            font=font,
            anchor="mm",
            align="center",
            stroke_width=2,
            stroke_fill="white",
        )
    return picture


def seen_part(image: Image.Image, config: dict[str, Any]) -> Image.Image:
    """Return the part of an image that timm's transform for measuring keeps, at its own scale.

    Args:
        image: Of any size.
        config: timm's data config: `input_size`, `crop_pct` and `crop_mode` count.
    """
    kept = [config["input_size"][2], config["input_size"][1]]  # width and height
    resized = [math.floor(side / config["crop_pct"]) for side in kept]
    scales = [new / old for new, old in zip(resized, image.size, strict=True)]
    mode = config.get("crop_mode", "center")
    if mode != "squash":
        scales = [min(scales) if mode == "border" else max(scales)] * 2
    width, height = (side / scale for side, scale in zip(kept, scales, strict=True))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def _heat(activation: torch.Tensor) -> Image.Image:
    low, high = activation.min(), activation.max()
    place = (activation - low) / (high - low).clamp(min=1e-12) * (len(COLOURS) - 1)
    first = place.floor().long().clamp(max=len(COLOURS) - 2)
    share = (place - first)[..., None]
    colours = COLOURS[first] * (1 - share) + COLOURS[first + 1] * share
    heat = to_pil_image(colours.permute(2, 0, 1).round().to(torch.uint8))
    return heat.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

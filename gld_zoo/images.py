"""Pictures of any kind as models take them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright and as RGB, with white under its transparent parts.

    16-bit grey is scaled to 8 bits; 32-bit integers count as 16-bit if one is above 255.

    Raises:
        ValueError: If it holds floats, whose white nothing tells.
    """
    if image.mode == "F":
        raise ValueError("it holds floats; convert it to 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert would cut every value above 255 to white
        values = np.asarray(image).clip(0, 65535)
        if image.mode != "I" or values.max() > 255:
            values = values // 257
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

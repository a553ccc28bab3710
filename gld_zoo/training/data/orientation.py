"""How EXIF turns an image, of which boxes and masks must know."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import ExifTags
from PIL import Image as PILImage

UPRIGHT = 1  # what EXIF calls an image that is seen as it is stored
PNG_TAGS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


def orientation_of(item: dict[str, Any]) -> int:
    """Return how EXIF turns an encoded image that can be read: 1 for not at all, up to 8."""
    content, path = item["bytes"], item["path"]
    if content is None and not Path(path).is_file():  # as an address, whose tags are not looked at
        return UPRIGHT
    with PILImage.open(path if content is None else io.BytesIO(content)) as image:
        # a PNG without tags before its pixels would be decoded whole to look for some behind them
        if image.format == "PNG" and not PNG_TAGS & image.info.keys():
            return UPRIGHT
        turn = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return turn if turn in range(1, 9) else UPRIGHT

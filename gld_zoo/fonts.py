"""Letters of any language in pictures: the font that has them, and how to spell the others."""

from __future__ import annotations

import importlib.util
import io
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

# for the letters that Pillow's own font lacks, which are all but ASCII; looked for by these names
# where systems keep fonts
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
)


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    r"""Return a text in letters that can be drawn, and the font that has most of them.

    A letter that the font lacks becomes that without its accent, or an escape such as `\u4e2d`.

    Args:
        text: One line.
        size: Height of the letters in pixels.
    """
    text = unicodedata.normalize("NFC", text)
    best, fewest = _own_font(size), len(text) + 1
    for font in _fonts(size):
        lacking = sum(not _has(font, letter) for letter in text)
        if lacking < fewest:
            best, fewest = font, lacking
        if not fewest:
            break
    return "".join(_spell(letter, best) for letter in text), best


def _fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    """Yield fonts: Pillow's own, then the largest one that matplotlib brings, then the system's."""
    yield _own_font(size)
    names = list(SYSTEM_FONTS)
    if matplotlib := importlib.util.find_spec("matplotlib"):  # not imported, which takes long
        folder = Path(matplotlib.origin or "").parent
        names.insert(0, str(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    yield from (font for name in names if (font := _load_font(name, size)))


@lru_cache
def _own_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as it is where a size is asked for
    return font


@lru_cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache
def _unshaped(font: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    # shaping puts a mark that the font lacks on something it has; `font_variant` of Pillow 12 keeps
    # the engine where BASIC, which is 0, is asked for
    content = io.BytesIO(font.font_bytes) if hasattr(font, "font_bytes") else font.path
    basic = ImageFont.Layout.BASIC
    return ImageFont.FreeTypeFont(content, font.size, font.index, layout_engine=basic)


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Tell whether a font draws a letter: what it lacks looks as what no font has."""
    if not letter.isprintable():
        return False
    drawn, box = (_unshaped(font).getmask(each) for each in (letter, "\uffff"))
    return (drawn.size, bytes(drawn)) != (box.size, bytes(box))


def _spell(letter: str, font: ImageFont.FreeTypeFont) -> str:
    if _has(font, letter):
        return letter
    plain = "".join(
        part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part)
    )
    if plain and all(_has(font, part) for part in plain):
        return plain
    return letter.encode("unicode_escape").decode()

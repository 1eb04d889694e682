"""A matrix of pictures and texts, drawn: thumbnails along the top, texts down the side, a colour for each pair."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ldm.pipeline.clip.model import has_other_script

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MOST_PICTURES, MOST_TEXTS = 64, 100
CELL, ROW = 96, 40
"""The sides of a thumbnail, and the least height of a row, in pixels."""
MARGIN, FONT = 8, 14
LINE = FONT + 4
TEXT_WIDTH = 260
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf")
LINES = 3
"""Of a text, before it is cut."""
RAMP: tuple[Colour, ...] = ((247, 251, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))
"""From the lowest cosine to the highest one."""


def shade(value: float, low: float, high: float) -> Colour:
    """The colour of a value between the lowest and the highest one."""
    place = (value - low) / (high - low) * (len(RAMP) - 1) if high > low else 0.0
    index = min(int(place), len(RAMP) - 2)
    share = place - index
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(RAMP[index], RAMP[index + 1], strict=True))
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is read better on a colour (its luma by ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else (255, 255, 255)


def heat_map(
    pictures: Sequence[Image.Image], names: Sequence[str], texts: Sequence[str], cosines: Sequence[Sequence[float]]
) -> Image.Image:
    """RGB pictures with names, texts, and each picture's cosines -> the drawing; a picture's best text is framed."""
    font, small = _font(FONT, texts), _font(11, names)
    wrapped = [_wrapped(text, TEXT_WIDTH, font) for text in texts]
    heights = [max(ROW, len(lines) * LINE + 6) for lines in wrapped]
    left = MARGIN + round(max(font.getlength(line) for lines in wrapped for line in lines)) + MARGIN
    top = MARGIN + CELL + LINE
    canvas = Image.new("RGB", (left + len(pictures) * CELL + MARGIN, top + sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x = left + column * CELL
        canvas.paste(ImageOps.fit(picture, (CELL - 4, CELL - 4)), (x + 2, MARGIN))
        pen.text((x + CELL // 2, MARGIN + CELL), _cut(name, CELL - 4, small), fill="black", font=small, anchor="ma")
    low, high = min(map(min, cosines)), max(map(max, cosines))
    y = top
    for row, (lines, height) in enumerate(zip(wrapped, heights, strict=True)):
        pen.multiline_text(
            (left - MARGIN, y + height // 2), "\n".join(lines), fill="black", font=font, anchor="rm", align="right"
        )
        for column, values in enumerate(cosines):
            x, colour = left + column * CELL, shade(values[row], low, high)
            pen.rectangle((x, y, x + CELL - 1, y + height - 1), fill=colour)
            if values[row] == max(values) and len(texts) > 1:
                pen.rectangle((x + 1, y + 1, x + CELL - 2, y + height - 2), outline=(230, 85, 13), width=3)
            number = f"{values[row]:.3f}"
            pen.text((x + CELL // 2, y + height // 2), number, fill=ink_on(colour), font=font, anchor="mm")
        y += height
    return canvas


def _font(size: int, texts: Sequence[str]) -> Font:
    """Pillow's own font; for other alphabets the first of the system's large ones that there is."""
    for name in WIDE_FONTS if any(has_other_script(text) for text in texts) else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """A text in lines that are no wider, the last of them cut."""
    letters = max(8, int(width / font.getlength("n")))
    lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" …") or [""]
    return [_cut(line, width, font) for line in lines]


def _cut(text: str, width: int, font: Font) -> str:
    """The text, without its end where it is wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"

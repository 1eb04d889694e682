"""Many pictures in one: rows of tiles, with labels below each or along the axes."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image, ImageFont

MARGIN = 4
LABEL_LINES = 3


def compose(
    pictures: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, margin: int = MARGIN
) -> Image.Image:
    """Pictures of one size -> a grid of them, row by row, on white; under each its label where there are labels."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = pictures[0].size
    font = ImageFont.load_default(max(9, width // 12))
    cell = height + (_line(font) * LABEL_LINES + margin if labels else 0)
    columns, rows = min(columns, len(pictures)), -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + margin) + margin, rows * (cell + margin) + margin), "white")
    pen = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        left, top = margin + index % columns * (width + margin), margin + index // columns * (cell + margin)
        grid.paste(picture, (left, top))
        if labels:
            text = "\n".join(_wrapped(labels[index], width, font, LABEL_LINES))
            pen.multiline_text((left, top + height + 1), text, fill="black", font=font, spacing=1)
    return grid


def with_axes(pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Pictures of one size -> a grid of them with a label over each column and, where it has one, before each row."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = pictures[0].size
    font = ImageFont.load_default(max(12, width // 16))
    across = [_wrapped(label, width, font, LABEL_LINES) for label in columns]
    down = [_wrapped(label, width, font, max(1, height // (_line(font) + 1))) for label in rows]
    left = round(max((font.getlength(line) for lines in down for line in lines), default=-MARGIN)) + MARGIN
    line = _line(font) + 1
    top = max(len(lines) for lines in across) * line + MARGIN
    grid = compose(pictures, len(columns))
    canvas = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    canvas.paste(grid, (left, top))
    pen = ImageDraw.Draw(canvas)
    for index, lines in enumerate(across):
        middle = left + MARGIN + index * (width + MARGIN) + width // 2
        over, text = top - len(lines) * line, "\n".join(lines)
        pen.multiline_text((middle, over), text, fill="black", font=font, spacing=1, anchor="ma", align="center")
    for index, lines in enumerate(down):
        middle = top + MARGIN + index * (height + MARGIN) + height // 2
        text = "\n".join(lines)
        pen.multiline_text((left - 1, middle), text, fill="black", font=font, spacing=1, anchor="rm", align="right")
    return canvas


def message_tile(message: str, size: tuple[int, int]) -> Image.Image:
    """A grey tile that says why there is no picture."""
    from PIL import Image, ImageDraw, ImageFont

    tile = Image.new("RGB", size, (200, 200, 200))
    font = ImageFont.load_default(max(9, size[0] // 16))
    lines = _wrapped(message, size[0] - 2 * MARGIN, font, max(1, (size[1] - 2 * MARGIN) // (_line(font) + 1)))
    ImageDraw.Draw(tile).multiline_text((MARGIN, MARGIN), "\n".join(lines), fill="black", font=font, spacing=1)
    return tile


def centred(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture in the middle of a white one that is at least as large."""
    from PIL import Image

    if picture.size == size:
        return picture
    tile = Image.new("RGB", size, "white")
    tile.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return tile


def _line(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """The height of a line of text."""
    return round(font.getbbox("Ag")[3]) + 1


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int) -> list[str]:
    """Lines of about `width` pixels, the last of at most so many with an ellipsis where there is more."""
    letters = max(8, int(width / font.getlength("e")))
    return textwrap.wrap(text, letters, max_lines=most, placeholder="…")

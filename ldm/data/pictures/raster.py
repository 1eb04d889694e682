"""Pictures from vector art: rendering, and the few things done to sprites (RGBA drawings cut to their figure)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from random import Random

import numpy as np
import resvg_py
from PIL import Image

from ldm.data.pictures.colors import COLORS, SHADE_NAMES, Rgb, dominant_colors, name_pixels, shade

SIZE = 256
"""Pixels, the side of every picture."""

WHITE: Rgb = (255, 255, 255)
LUMA = np.array([0.3, 0.59, 0.11])

SHADES_OF = {
    "red": ("red", "pink", "orange", "brown"),
    "orange": ("orange", "yellow", "red", "brown", "beige"),
    "yellow": ("yellow", "orange", "beige", "brown"),
    "green": ("green", "teal"),
    "blue": ("blue", "teal", "purple"),
    "purple": ("purple", "pink", "blue"),
    "pink": ("pink", "red", "purple"),
    "teal": ("teal", "blue", "green"),
    "brown": ("brown", "orange", "red", "beige", "yellow"),
}
"""The colour words that light and shadow make of an object of one colour."""


def render(svg: str, size: int = SIZE) -> Image.Image:
    """Draw an SVG document as an RGBA picture of size x size."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def flatten(sprite: Image.Image, ground: Rgb = WHITE) -> Image.Image:
    """RGBA over one colour -> RGB."""
    picture = Image.new("RGB", sprite.size, ground)
    picture.paste(sprite, mask=sprite.getchannel("A"))
    return picture


def crop(sprite: Image.Image) -> Image.Image:
    """Cut the empty margins off."""
    box = sprite.getbbox()
    return sprite.crop(box) if box else sprite


def fit(sprite: Image.Image, side: float) -> Image.Image:
    """Scale to fill a square of `side` pixels, proportions kept."""
    scale = min(side / sprite.width, side / sprite.height)
    width, height = max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))
    return sprite.resize((width, height), Image.Resampling.LANCZOS)


def paste(canvas: Image.Image, sprite: Image.Image, x: float, y: float) -> None:
    """Put a sprite on an RGB canvas with its middle at (x, y)."""
    canvas.paste(sprite, (int(x - sprite.width / 2), int(y - sprite.height / 2)), sprite)


def plain(rng: Random, color: str) -> Image.Image:
    """A canvas in a random shade of a colour; `white` is pure and draws nothing from rng."""
    return Image.new("RGB", (SIZE, SIZE), WHITE if color == "white" else shade(rng, color))


def gradient(rng: Random, top: str, bottom: str) -> Image.Image:
    """A canvas that goes from one colour to another, downwards."""
    first, last = np.array(shade(rng, top), float), np.array(shade(rng, bottom), float)
    t = np.linspace(0, 1, SIZE)[:, None]
    column = first * (1 - t) + last * t
    return Image.fromarray(column[:, None].repeat(SIZE, 1).astype(np.uint8))


def recolor(rng: Random, sprite: Image.Image, colors: Sequence[tuple[str, float]], target: str) -> Image.Image | None:
    """Paint the parts in a sprite's main colour with `target`, light and shadow kept.

    colors: the sprite's `dominant_colors`. Returns None if the result would not be called `target`.
    """
    pixels = np.asarray(sprite).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    names = SHADE_NAMES[name_pixels(rgb.reshape(-1, 3).astype(np.uint8))].reshape(rgb.shape[:2])
    main = colors[0][0]
    mask = np.isin(names, SHADES_OF.get(main, (main,))) & (alpha[..., 0] > 8)
    if not mask.any():
        return None
    typical = np.median(rgb[mask], 0)
    paint = np.array(rng.choice(COLORS[target]), np.float32)
    light = (rgb * LUMA).sum(-1, keepdims=True) / max(1.0, float((typical * LUMA).sum()))
    shadow, highlight = paint * light, paint + (255 - paint) * np.clip((light - 1) * 0.8, 0, 1)
    painted = np.where(mask[..., None], np.where(light <= 1, shadow, highlight), rgb)
    result = Image.fromarray(np.concatenate([np.clip(painted, 0, 255), alpha], -1).astype(np.uint8), "RGBA")
    found = dominant_colors(result)
    return result if found and found[0][0] == target and found[0][1] > 0.45 else None

"""Thirteen colour words, and which of them a pixel, a paint or a drawing is called.

A colour gets the name of the nearest of a few sample shades in CIELAB, where distance is close to what the eye sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cache
from random import Random

import numpy as np
from PIL import Image

Rgb = tuple[int, int, int]

COLORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((214, 40, 40), (230, 60, 60), (180, 20, 30)),
    "orange": ((245, 130, 30), (250, 160, 70), (235, 110, 40)),
    "yellow": ((250, 205, 40), (255, 225, 90), (240, 190, 20)),
    "green": ((60, 160, 70), (110, 190, 80), (30, 120, 60), (150, 210, 90)),
    "teal": ((20, 160, 160), (90, 215, 205), (10, 120, 120)),
    "blue": ((40, 110, 220), (70, 160, 240), (30, 60, 160), (130, 200, 250), (205, 232, 250)),
    "purple": ((130, 80, 200), (165, 130, 230), (95, 40, 150), (208, 208, 246)),
    "pink": ((240, 110, 170), (250, 165, 195), (220, 60, 140), (255, 214, 222)),
    "brown": ((130, 80, 50), (100, 60, 35), (165, 110, 75)),
    "black": ((15, 15, 18), (40, 40, 46)),
    "gray": ((128, 130, 134), (170, 174, 178), (90, 94, 100)),
    "white": ((250, 250, 250), (232, 234, 238)),
    "beige": ((235, 205, 165), (245, 225, 195)),
}
GROUNDS = tuple(name for name in COLORS if name != "white")
"""The colours of generated backgrounds."""

SHADE_NAMES = np.array([name for name, shades in COLORS.items() for _ in shades])
"""The colour word of each sample shade; `name_pixels` answers with indices into it."""

LIGHTNESS_WEIGHT = 0.6
"""A name depends on lightness less than on hue."""

COVERS = 0.12
"""The least share of a drawing's opaque area for a colour to be said of it."""


def cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 255] -> CIELAB (..., 3): D65 white, IEC 61966-2-1 and CIE 15."""
    unit = np.asarray(rgb, np.float64) / 255.0
    linear = np.where(unit > 0.04045, ((unit + 0.055) / 1.055) ** 2.4, unit / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """uint8 pixels (N, 3) -> (N,) indices into SHADE_NAMES."""
    red, green, blue = (np.asarray(rgb).astype(np.int64) >> 2).T
    return _names_of_cells()[(red * 64 + green) * 64 + blue]


def color_name(hex_color: str, among: Collection[str] = ()) -> str:
    """The word for "#rrggbb"; if `among` is given, the nearest of those words."""
    digits = hex_color.lstrip("#")
    rgb = np.array([[int(digits[i : i + 2], 16) for i in (0, 2, 4)]])
    if not among:
        return str(SHADE_NAMES[name_pixels(rgb)[0]])
    distance = ((cielab(rgb) - _shades_lab()) ** 2).sum(-1)
    distance[~np.isin(SHADE_NAMES, list(among))] = np.inf
    return str(SHADE_NAMES[distance.argmin()])


def dominant_colors(sprite: Image.Image) -> list[tuple[str, float]]:
    """Up to four colour words of an RGBA drawing with their shares of its opaque area, largest first."""
    pixels = np.asarray(sprite.resize((64, 64), Image.Resampling.BILINEAR))
    opaque = pixels[pixels[..., 3] > 128][:, :3]
    if len(opaque) < 20:
        return []
    counts = Counter(SHADE_NAMES[name_pixels(opaque)].tolist())
    return [(name, n / len(opaque)) for name, n in counts.most_common(4) if n / len(opaque) > COVERS]


def shade(rng: Random, name: str) -> Rgb:
    """A random paint that is still called `name`."""
    base = np.array(rng.choice(COLORS[name]), float)
    spread = 6 if name in ("black", "white", "gray") else 14
    for _ in range(8):
        jitter = np.array([rng.uniform(-spread, spread) for _ in range(3)])
        paint = np.clip(base + jitter, 0, 255).astype(int)
        if SHADE_NAMES[name_pixels(paint[None])[0]] == name:
            return _rgb(paint)
    return _rgb(base)


def _rgb(values: np.ndarray) -> Rgb:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


@cache
def _shades_lab() -> np.ndarray:
    return cielab(np.array([rgb for shades in COLORS.values() for rgb in shades]))


@cache
def _names_of_cells() -> np.ndarray:
    """The shade index of each of the 64^3 cells of the colour cube, taken at the cell's middle."""
    middle = np.arange(64) * 4 + 2
    cells = np.stack(np.meshgrid(middle, middle, middle, indexing="ij"), -1).reshape(-1, 3)
    weights = np.array([LIGHTNESS_WEIGHT, 1.0, 1.0])
    nearest = [
        (((cielab(part)[:, None] - _shades_lab()) * weights) ** 2).sum(-1).argmin(1)
        for part in np.array_split(cells, 64)  # in parts: the whole table of distances would take 200 MB
    ]
    return np.concatenate(nearest).astype(np.uint8)

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image

from ldm.data.pictures.colors import COLORS, SHADE_NAMES, cielab, color_name, dominant_colors, name_pixels, shade


@pytest.mark.parametrize(
    ("rgb", "lab"),  # published values for the D65 white point
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_cielab(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(cielab(np.array(rgb)), lab, atol=0.05)


def test_every_sample_shade_has_its_own_name() -> None:
    for name, shades in COLORS.items():
        assert set(SHADE_NAMES[name_pixels(np.array(shades, np.uint8))]) == {name}


@pytest.mark.parametrize(
    ("hex_color", "name"),
    [("#ff0000", "red"), ("#00ff00", "green"), ("1e90ff", "blue"), ("#FFFFFF", "white"), ("#808080", "gray"),
     ("#ff8c00", "orange"), ("#800080", "purple"), ("#8b4513", "brown"), ("#f5f5dc", "beige"), ("#000000ff", "black")],
)  # fmt: skip
def test_css_colours_have_their_names(hex_color: str, name: str) -> None:
    assert color_name(hex_color) == name


def test_a_name_from_a_few() -> None:
    assert color_name("#0000ff", among=("red", "yellow")) in ("red", "yellow")
    assert color_name("#ffff80", among=("red", "orange", "yellow")) == "yellow"


def test_paints_are_called_what_was_asked_for() -> None:
    rng = Random(0)
    for name in COLORS:
        paints = np.array([shade(rng, name) for _ in range(50)], np.uint8)
        assert set(SHADE_NAMES[name_pixels(paints)]) == {name}
        assert len(np.unique(paints, axis=0)) > 10


def test_the_colours_of_a_drawing_leave_its_empty_parts_out() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :48] = (214, 40, 40, 255)
    pixels[:32, 48:] = (40, 110, 220, 255)
    assert dominant_colors(Image.fromarray(pixels)) == [("red", 0.75), ("blue", 0.25)]
    assert dominant_colors(Image.new("RGBA", (64, 64))) == []

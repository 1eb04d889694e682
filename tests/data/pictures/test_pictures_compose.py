"""Whether the pixels show what the captions say, on plain squares instead of artwork."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from PIL import Image

from ldm.data.pictures import compose
from ldm.data.pictures.colors import COLORS, SHADE_NAMES, dominant_colors, name_pixels
from ldm.data.pictures.picture import Picture, Scene, Sprite
from ldm.data.pictures.raster import SIZE, recolor
from ldm.data.pictures.sources import EMOJI_SETS, Concept

NAMES = {"red": "fox", "blue": "ox", "green": "frog", "purple": "mouse"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "nine": 9}


def sprite(color: str) -> Sprite:
    image = Image.new("RGBA", (40, 40), (*COLORS[color][0], 255))
    concept = Concept(f"code-{color}", NAMES[color], (), "animals-nature", "animal-mammal", f"code-{color}")
    return Sprite(EMOJI_SETS[0], concept, image, dominant_colors(image))


SPRITES = [sprite(color) for color in NAMES]
COLOR_OF = {noun: color for color, noun in NAMES.items()}


def color_map(picture: Picture) -> np.ndarray:
    """(SIZE, SIZE) colour words."""
    assert picture.image.size == (SIZE, SIZE)
    return SHADE_NAMES[name_pixels(np.asarray(picture.image).reshape(-1, 3))].reshape(SIZE, SIZE)


def middle_of(colors: np.ndarray, color: str) -> tuple[float, float]:
    """Mean (x, y) of the pixels of a colour."""
    ys, xs = np.nonzero(colors == color)
    assert len(xs) > 0
    return float(xs.mean()), float(ys.mean())


def colored_pairs(noun: str) -> Iterator[tuple[re.Match[str], np.ndarray]]:
    for picture in compose.pairs(Random(1), SPRITES, 120):
        colors = color_map(picture)
        for text in picture.texts:
            if match := re.match(noun, text):
                yield match, colors


@pytest.mark.parametrize(
    ("words", "axis", "sign"),
    [("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1)],
)
def test_pairs_stand_as_their_captions_say(words: str, axis: int, sign: int) -> None:
    seen = 0
    for match, colors in colored_pairs(rf"an? (\w+) {words} an? (\w+)"):
        first, second = (middle_of(colors, COLOR_OF[noun])[axis] for noun in match.groups())
        assert (first - second) * sign > 60
        seen += 1
    assert seen > 5


def test_large_is_larger_than_small() -> None:
    seen = 0
    for match, colors in colored_pairs(r"a large (\w+) and a small (\w+)"):
        large, small = (np.count_nonzero(colors == COLOR_OF[noun]) for noun in match.groups())
        assert large > 4 * small > 0
        seen += 1
    assert seen > 5


def test_counts_are_right() -> None:
    for picture in compose.counts(Random(2), SPRITES, 40):
        number, side = NUMBERS[picture.texts[0].split()[0]], compose.GRID_SIDE[picture.extra["attrs"]["count"]]
        color = COLOR_OF[str(picture.label)]
        # of five, the middle one may overlap the corners of the others
        assert np.count_nonzero(color_map(picture) == color) == pytest.approx(number * side**2, rel=0.06)
        assert picture.extra["attrs"]["count"] == number


def test_grounds_have_the_colour_that_is_said() -> None:
    for picture in compose.on_grounds(Random(3), SPRITES, 40):
        colors, attributes = color_map(picture), picture.extra["attrs"]
        assert f"{attributes['bg']} " in picture.texts[0]
        assert colors[0, 0] == attributes["bg"]
        assert colors[-1, -1] == (attributes["bg2"] or attributes["bg"])
        assert colors[SIZE // 2, SIZE // 2] == COLOR_OF[str(picture.label)]
        width = np.count_nonzero(colors[SIZE // 2] == COLOR_OF[str(picture.label)])
        allowed = {"small": (97,), "large": (243,), "": (184, 218)}[attributes["size"]]
        assert any(abs(width - side) <= 2 for side in allowed)


def test_recoloured_objects_are_of_that_colour() -> None:
    pictures = list(compose.recolored(Random(4), SPRITES, 30))
    assert len(pictures) == 30
    for picture in pictures:
        color = picture.extra["attrs"]["color"]
        assert re.match(rf"an? {color} \w+,", picture.texts[0])
        colors = color_map(picture)
        assert np.mean(colors[64:192, 64:192] == color) > 0.9
        assert colors[2, 2] == picture.extra["attrs"]["bg"]


def test_recolouring_keeps_the_outline_and_other_colours() -> None:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[5:35, 5:35] = (*COLORS["red"][0], 255)
    pixels[5:10, 5:35] = (*COLORS["black"][0], 255)
    image = Image.fromarray(pixels)
    painted = recolor(Random(0), image, dominant_colors(image), "blue")
    assert painted is not None
    result = np.asarray(painted)
    np.testing.assert_array_equal(result[..., 3], pixels[..., 3])
    np.testing.assert_array_equal(result[5:10], pixels[5:10])
    assert SHADE_NAMES[name_pixels(result[20:21, 20, :3])[0]] == "blue"


def test_recolouring_gives_up_where_nothing_has_the_main_colour() -> None:
    image = Image.new("RGBA", (40, 40), (*COLORS["green"][0], 255))
    assert recolor(Random(0), image, [("red", 1.0)], "blue") is None


def test_objects_stand_in_scenes_where_the_caption_says() -> None:
    scene = Scene(Image.new("RGB", (SIZE, SIZE), COLORS["yellow"][0]), "a landscape with hills", {"color": "yellow"})
    for picture in compose.in_scenes(Random(5), SPRITES, [scene], 30):
        x, y = middle_of(color_map(picture), COLOR_OF[str(picture.label)])
        side = "left" if x < 96 else "right" if x > 160 else "middle"
        assert picture.extra["attrs"]["pos"] == side
        assert (f"on the {side}" in picture.texts[0]) == (side != "middle")
        assert y > SIZE / 2
    assert scene.image.getcolors() == [(SIZE**2, COLORS["yellow"][0])]  # the scene itself stays as it was


def test_shapes_have_their_colours_and_places() -> None:
    seen = set()
    for picture in compose.shapes(Random(6), 60):
        colors = color_map(picture)
        match = re.match(r"an? (\w+) (\w+) (to the left of|above) an? (\w+) (\w+)", picture.texts[0])
        if match is None:
            continue
        color, _, relation, other, _ = match.groups()
        if color == other:
            continue
        axis = 0 if relation == "to the left of" else 1
        assert middle_of(colors, color)[axis] < middle_of(colors, other)[axis] - 60
        seen.add(relation)
    assert seen == {"to the left of", "above"}


def test_the_same_seed_composes_the_same_pictures() -> None:
    first, second = ([p.image.tobytes() for p in compose.pairs(Random(7), SPRITES, 6)] for _ in range(2))
    assert first == second

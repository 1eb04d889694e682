from __future__ import annotations

from typing import Any

import pytest

from ldm.data.pictures.parametric import STYLES, Parts, captions, draw, open_style

EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "critters",
        {"bodyVariant": "egg", "eyesVariant": "wink", "mouthVariant": "smile", "topVariant": "horns",
         "patternVariant": "dots", "bodyColor": ["#ff0000"], "backgroundColor": ["#ffffff"]},
        "an egg-shaped red monster with a wink, a smile, horns and dots on a white background, paper monster style",
        "a red monster, paper monster style",
    ),
    (
        "sprouts",
        {"plantVariant": "tulip", "eyesVariant": "happy", "mouthVariant": "grin", "potColor": ["#ff8c00"],
         "backgroundColor": ["#808080"]},
        "a tulip in an orange pot, the pot has happy eyes and a grin on a gray background, potted plant style",
        "a tulip in an orange pot, potted plant style",
    ),
    (
        "planets",
        {"ringVariant": "double", "moonsVariant": "two", "surfaceVariant": "cap", "planetColor": ["#1e90ff"]},
        "an ice-capped blue planet with a double ring and two moons in space, planet illustration",
        "a blue planet with a ring, planet illustration",
    ),
    (
        "landscape",
        {"orbVariant": "ring", "orbColor": ["#ffff80"], "hill1Variant": "dunes", "hill1Color": ["#1e90ff"],
         "hill3Variant": "peak", "hill3Color": ["#800080"], "backgroundColor": ["#ff8c00"]},
        "a landscape with purple peaks and blue dunes under a yellow ringed sun, orange sky, landscape illustration",
        "a landscape with hills under a yellow ringed sun, landscape illustration",
    ),
    (
        "voxel-art",
        {"outfitVariant": "suit", "jacketColor": ["#000000"], "shirtColor": ["#ffffff"], "topVariant": "mohawk",
         "hairColor": ["#ff0000"], "glassesVariant": "shades", "beardVariant": "full", "mouthVariant": "tongue",
         "backgroundColor": ["#1e90ff"]},
        "a voxel person in a black suit with a red mohawk, sunglasses, a beard and their tongue out on a blue "
        "background, voxel style",
        "a voxel person in a black suit with a red mohawk, voxel style",
    ),
    (
        "voxel-bot",
        {"bodyColor": ["#ff8c00"], "eyesVariant": "plus", "mouthVariant": "grill", "topVariant": "dish",
         "chestVariant": "heart", "backgroundColor": ["#808080"]},
        "an orange voxel robot with plus-shaped eyes, a grill mouth, a dish antenna and a heart on its chest on a gray "
        "background, voxel style",
        "an orange voxel robot, voxel style",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "full", "short"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_parts_are_put_into_words(name: str, options: dict[str, Any], full: str, short: str) -> None:
    texts = captions(STYLES[name].describe(Parts(options)), STYLES[name].words)
    assert (texts[0], texts[2]) == (full, short)


@pytest.mark.parametrize("name", STYLES)
def test_every_drawing_can_be_described(name: str) -> None:
    style = open_style(name)
    for seed in range(20):
        svg, parts = draw(style, f"test-{seed}", 256)
        assert svg.startswith("<svg")
        description = STYLES[name].describe(parts)
        assert set(STYLES[name].split_by) <= set(description.attributes)
        for text in captions(description, STYLES[name].words):
            assert "None" not in text and "  " not in text and " ," not in text
            assert text.endswith(STYLES[name].words)


def test_a_seed_draws_the_same_again() -> None:
    style = open_style("clay")
    assert draw(style, "a", 64)[0] == draw(style, "a", 64)[0] != draw(style, "b", 64)[0]

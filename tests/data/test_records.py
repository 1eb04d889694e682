from __future__ import annotations

import pytest

from ldm.data.records import KIND_SHARES, may_flip


@pytest.mark.parametrize(
    ("caption", "flips"),
    [
        ("a red apple, noto emoji style", True),
        ("a copyright holder, bright light, flat emoji style", True),  # "right" only inside words
        ("a flamingo and a hospital, twemoji style", True),
        ("a purple heart above an orange cross, geometric shapes", True),
        ("a flamingo to the left of a hospital, twemoji style", False),
        ("a giraffe on the right in a landscape with hills", False),
        ("a right-facing fist, blob emoji style", False),
        ("a clock showing two-thirty, noto emoji style", False),
        ("a clock showing one o'clock", False),
        ("a mantelpiece clock, 3d emoji style", False),
        ("a back arrow, flat emoji style", False),
        ("arrows over a shield icon", False),
        ("an input latin letters, twemoji style", False),
        ("a Japanese open for business button", False),
        ("a waxing crescent moon, noto emoji style", False),
        ("a first quarter moon", False),
        ("a spiral notepad, text, noto emoji style", False),
    ],
)
def test_only_pictures_whose_mirror_image_fits_the_captions_are_flipped(caption: str, flips: bool) -> None:
    assert may_flip({"texts": [caption], "label": "thing"}) is flips
    assert may_flip({"texts": ["a thing", caption]}) is flips  # every caption counts, whichever is drawn
    assert may_flip({"texts": ["a thing"], "label": ["thing", caption]}) is flips


def test_shares_are_a_whole() -> None:
    assert sum(KIND_SHARES.values()) == pytest.approx(1.0)

"""What is said of a CLIP, on CLIPs that know everything, only words, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.pictures.splits import HELD_OUT_PAIR
from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP
from ldm.training.clip.figures import bag_of_words, clip_figures

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}


def two_colors(left: str, right: str) -> np.ndarray:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, :4], picture[:, 4:] = COLORS[left], COLORS[right]
    return picture


def packed(pairs: list[tuple[str, str]], **told: str) -> tuple[np.ndarray, list[dict]]:
    """Pictures of two colours side by side; their order is in the caption, and no bag of words tells it."""
    records = [{"texts": [f"{a} beside {b}"], "label": f"{a} beside {b}", **told} for a, b in pairs]
    return np.stack([two_colors(*pair) for pair in pairs]), records


def of_image(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return torch.cat((pixels[0, 0], pixels[0, -1])) + 0.1


def of_text(text: str) -> torch.Tensor:
    words = [word for word in text.split() if word in COLORS]
    return of_image(Image.fromarray(two_colors(words[0], words[-1]))) if words else torch.ones(6)


def clip(blind: bool = False) -> CLIP:
    return CLIP(
        name="test", identity="", width=6, scale=1.0, bias=0.0, english=True,
        embed_images=lambda images: torch.stack([of_image(image) for image in images]),
        embed_texts=lambda texts: torch.stack([torch.ones(6) if blind else of_text(text) for text in texts]),
    )  # fmt: skip


PAIRS = [(a, b) for a in COLORS for b in COLORS if a != b]


def test_a_clip_that_reads_sentences_beats_the_bag_of_words() -> None:
    told = clip_figures(clip(), packed(PAIRS, split=HELD_OUT_PAIR), packed(PAIRS * 4))
    assert told.pictures == told.classes == len(PAIRS)
    assert told.text_to_image[1] == told.image_to_text[1] == told.zero_shot[1] == 1
    # two pictures hold the same two colours: the bag finds both, and which of them comes first is luck or rounding
    assert told.words_to_image[1] < 0.9 and told.words_zero_shot[1] < 0.9
    assert min(told.words_to_image[5], told.words_zero_shot[5]) > 0.5 > 5 / 12


def test_a_clip_that_reads_nothing_is_at_chance() -> None:
    told = clip_figures(clip(blind=True), packed(PAIRS, split=HELD_OUT_PAIR), packed(PAIRS * 4))
    assert told.text_to_image == pytest.approx({1: 1 / 12, 5: 5 / 12})
    assert told.zero_shot == pytest.approx({1: 1 / 12, 5: 5 / 12})


def test_captions_are_searched_once_each() -> None:
    told = clip_figures(clip(), packed([*PAIRS, *PAIRS], split=HELD_OUT_PAIR), packed(PAIRS * 4), count=9)
    assert told.pictures == 9 and told.text_to_image[1] == 1
    told = clip_figures(clip(), packed([*PAIRS, *PAIRS], split=HELD_OUT_PAIR), packed(PAIRS * 4))
    assert told.pictures == len(PAIRS)


def test_a_bag_of_words_is_what_least_squares_says() -> None:
    """Two words that stand alone: each one's vector is its pictures' mean, but for the penalty."""
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    words = bag_of_words(["sun"] * 1000 + ["moon"] * 1000, torch.stack([x] * 1000 + [y] * 1000))
    assert torch.allclose(words(["the sun", "Moon!"]), torch.stack((x, y)), atol=0.02)
    assert torch.allclose(words(["unknown"]), torch.full((1, 2), 0.5**0.5), atol=1e-3)


def test_two_pictures_are_the_least() -> None:
    with pytest.raises(LdmError, match="left-out pictures: found 1 and 0 classes, expected two of each"):
        clip_figures(clip(), packed(PAIRS[:1]), packed(PAIRS))

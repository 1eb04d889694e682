"""Zero-shot classification and scores against the formulas, in float64, on a CLIP whose vectors are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.zero_shot import TEMPLATES, filled
from ldm.pipeline.clip.model import CLIP
from ldm.tasks.classify import MAX_TEMPLATES, Match, classify
from ldm.tasks.score import MAX_TEXTS, score

WIDTH = 6
IMAGES = [Image.new("RGB", (8, 8), (10 * i, 3, 5)) for i in range(5)]
LABELS = ["cat", "dog", "owl"]


def vector(seed: object) -> np.ndarray:
    """A vector of some length for anything, always the same."""
    number = int.from_bytes(str(seed).encode()[:24].ljust(24, b"."), "little")
    return np.random.default_rng(number).standard_normal(WIDTH) * 3


def red(image: Image.Image) -> Any:
    colour = image.getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour[0]


def known(scale: float = 4.0, bias: float = 0.0, english: bool = True) -> CLIP:
    def embed(things: Sequence[object]) -> Tensor:
        return torch.tensor(np.array([vector(thing) for thing in things]), dtype=torch.float32)

    return CLIP(
        "known", "0", WIDTH, scale, bias, english,
        embed_images=lambda images: embed([red(image) for image in images]), embed_texts=embed,
    )  # fmt: skip


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def expected_cosines(templates: Sequence[str]) -> np.ndarray:
    """Each label is the mean of its unit vectors in the templates, normalised (Radford et al. 2021, 3.1.4)."""
    labels = [unit(np.mean([unit(vector(filled(t, label))) for t in templates], axis=0)) for label in LABELS]
    return np.array([[unit(vector(red(image))) @ label for label in labels] for image in IMAGES])


@pytest.mark.parametrize("templates", [("{}",), TEMPLATES], ids=["one", "default"])
@pytest.mark.parametrize("bias", [0.0, -3.0], ids=["softmax", "sigmoid"])
def test_classification_equals_the_formula(templates, bias):
    cosines = expected_cosines(templates)
    logits = 4.0 * cosines + bias
    odds = np.exp(logits)
    probabilities = odds / (1 + odds) if bias else odds / odds.sum(axis=1, keepdims=True)
    found = classify(known(bias=bias), IMAGES, LABELS, templates)
    assert len(found) == len(IMAGES)
    for matches, row, column in zip(found, probabilities, cosines, strict=True):
        order = np.argsort(-column)
        assert [match.label for match in matches] == [LABELS[i] for i in order]
        assert [match.probability for match in matches] == pytest.approx(row[order], abs=1e-5)
        assert [match.cosine for match in matches] == pytest.approx(column[order], abs=1e-5)
    total = [sum(match.probability for match in matches) for matches in found]
    assert (total == pytest.approx([1] * len(total))) == (bias == 0), "sigmoid models judge each label alone"


def test_scores_equal_the_formula():
    texts = ["a red cat", "something, else"]
    found = score(known(bias=-2.0), IMAGES, texts)
    cosines = np.array([[unit(vector(red(image))) @ unit(vector(text)) for text in texts] for image in IMAGES])
    np.testing.assert_allclose(found.cosines.numpy(), cosines, atol=1e-5)
    np.testing.assert_allclose(found.logits.numpy(), 4 * cosines - 2, atol=1e-4)


def test_one_label_has_probability_one():
    assert [matches[0].probability for matches in classify(known(), IMAGES, ["cat"])] == [1.0] * len(IMAGES)
    (match,) = classify(known(bias=-1.0), IMAGES[:1], ["cat"])[0]
    assert match.probability < 1 and isinstance(match, Match)


def test_no_picture_gives_nothing():
    assert classify(known(), [], LABELS) == []
    assert score(known(), [], LABELS).cosines.shape == (0, 3)


def test_labels_are_stripped():
    assert classify(known(), IMAGES, [" cat", "dog\n", "owl"]) == classify(known(), IMAGES, LABELS)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "found 0, expected 1 to 10000"),
        (["cat", " "], "number 2 is empty"),
        (["cat", "dog", "cat "], "'cat' is there twice"),
        ([str(i) for i in range(MAX_TEXTS + 1)], "found 10001, expected 1 to 10000"),
        (["x" * 1001], "number 1 has 1001 letters, expected at most 1000"),
    ],
)
def test_bad_labels(labels, said):
    for ask in (classify, score):
        with pytest.raises(LdmError, match=said.replace("'", "[\"']")):
            ask(known(), IMAGES, labels)


@pytest.mark.parametrize(
    ("templates", "said"),
    [((), "found 0"), (("{}",) * (MAX_TEMPLATES + 1), "found 101"), (("a {label}",), r"has no \{\}")],
)
def test_bad_templates(templates, said):
    with pytest.raises(LdmError, match=said):
        classify(known(), IMAGES, LABELS, templates)


def test_templates_are_filled_as_english_is_written():
    assert filled("a {}", "owl") == "an owl" and filled("a {}", "cat") == "a cat"
    assert filled("a photo of a {}", "Apple") == "a photo of an Apple"
    assert filled("a big {}, {}", "{} x") == "a big {} x, {} x", "a label is text, whatever is in it"


@pytest.mark.parametrize("text", ["猫", "кошка", "a γάτα", "قط"])
def test_other_scripts_are_named_where_only_english_is_read(text):
    (note,) = known().notes_on(["a cat", text, "chat naïf!", "été 2 ☂"])
    assert repr(text) in note and "known reads English only" in note and "--model" in note and "\n" not in note
    assert list(known(english=False).notes_on([text])) == []
    assert list(known().notes_on(["a cat", "été ☂ №5 µ"[:5]])) == []
    assert "and 1 more" in next(known().notes_on([text, text + "2"]))


def test_vectors_that_are_not_finite_are_an_error():
    clip = CLIP(
        "bad", "0", 2, 1.0, 0.0, True, lambda x: torch.full((len(x), 2), torch.nan), lambda x: torch.ones(len(x), 2)
    )
    with pytest.raises(LdmError, match="not finite"):
        classify(clip, IMAGES, LABELS)

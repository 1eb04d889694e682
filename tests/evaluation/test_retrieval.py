"""Recall and zero-shot accuracy against loops that sort, and against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.evaluation import retrieval as module
from ldm.evaluation.retrieval import retrieval, top_k
from ldm.evaluation.zero_shot import accuracy, class_vectors


def sorted_recall(images: np.ndarray, texts: np.ndarray, owners: np.ndarray, k: int) -> tuple[float, float]:
    """By sorting every row, as the papers describe it."""
    by_text = [owner in np.argsort(-(images @ text))[:k] for text, owner in zip(texts, owners, strict=True)]
    by_image = [i in owners[np.argsort(-(texts @ image))[:k]] for i, image in enumerate(images)]
    return float(np.mean(by_text)), float(np.mean(by_image))


@pytest.mark.parametrize("block", [7, 1024])
def test_recall_both_ways_equals_sorting(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=-1)
    owners = torch.cat([torch.arange(30), torch.randint(30, (40,), generator=generator)])
    texts = F.normalize(images[owners] + 0.5 * torch.randn(70, 8, generator=generator), dim=-1)
    found = retrieval(images, texts, owners, at=(1, 5))
    for k in (1, 5):
        want = sorted_recall(images.numpy(), texts.numpy(), owners.numpy(), k)
        assert (found.text_to_image[k], found.image_to_text[k]) == pytest.approx(want)
    assert 0.1 < found.text_to_image[1] < 0.95, "a case that could come out otherwise"


def test_a_model_that_collapsed_is_at_chance() -> None:
    same = F.normalize(torch.ones(20, 4), dim=-1)
    found = retrieval(same, same, torch.arange(20), at=(1, 5))
    assert found.text_to_image == pytest.approx({1: 1 / 20, 5: 5 / 20})
    assert found.image_to_text == pytest.approx({1: 1 / 20, 5: 5 / 20})
    assert accuracy(same, same[:4], torch.zeros(20, dtype=torch.long), at=(1,)) == {1: 0.25}


def test_a_model_that_says_nothing_finds_nothing() -> None:
    broken = torch.full((20, 4), torch.nan)
    found = retrieval(broken, broken, torch.arange(20), at=(1, 5))
    assert found.text_to_image == found.image_to_text == {1: 0.0, 5: 0.0}


def test_ties_are_shared() -> None:
    similarity = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.9, 0.2]])
    assert top_k(similarity, torch.tensor([0, 0]), at=(1, 2, 3)) == pytest.approx({1: 0.25, 2: 0.75, 3: 1.0})


def test_classes_are_the_direction_of_the_mean_over_templates() -> None:
    vectors = F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    known = dict(zip(["owl", "an owl", "red dog", "a red dog"], vectors, strict=True))
    got = class_vectors(lambda texts: torch.stack([known[text] for text in texts]), ["owl", "red dog"], ("{}", "a {}"))
    for row, (a, b) in zip(got.numpy(), vectors.numpy().reshape(2, 2, 3), strict=True):
        assert row == pytest.approx((a + b) / np.linalg.norm(a + b))


def test_zero_shot_picks_the_closest_class() -> None:
    classes = torch.eye(3)
    images = F.normalize(torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.5, 0.4], [0.3, 0.2, 0.9]]), dim=-1)
    assert accuracy(images, classes, torch.tensor([0, 2, 1]), at=(1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1})

"""What the judge says of pictures, and what is made of it, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.judge import Judge, JudgeConfig, differences, judge_textdiffs, judge_variations

CONFIG = JudgeConfig(("1f34e", "1f34f", "clay"), ("red apple", "green apple", "clay"), 16, (8, 16), 1)


class Told(Judge):
    """A judge that says what each picture's first pixel is: the level of class i is probability of class i."""

    def probabilities(self, pictures: Tensor) -> Tensor:
        return pictures[:, :, 0, 0]


@pytest.fixture
def told() -> Told:
    return Told(CONFIG)


def saying(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None].expand(-1, -1, 4, 4)


def test_pictures_of_any_size_and_number():
    torch.manual_seed(0)
    judge = Judge(CONFIG).eval()
    for count, height, width in ((1, 16, 16), (3, 50, 20), (300, 8, 8), (0, 16, 16)):
        said = judge.probabilities(torch.rand(count, 3, height, width))
        assert said.shape == (count, 3) and said.dtype == torch.float32
        torch.testing.assert_close(said.sum(dim=1), torch.ones(count))
    large = torch.rand(2, 3, 16, 16).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    small = large[:, :, ::3, ::3]
    assert (judge.probabilities(large) - judge.probabilities(small)).abs().max() < 0.05, "scaled down, not cut"
    best = judge.probabilities(small).argmax(dim=1)
    assert judge.names_of(small) == [CONFIG.names[i] for i in best]


def test_a_concept_by_its_code_or_its_name(told):
    assert [told.number(one) for one in ("1f34f", "green apple", "clay")] == [1, 1, 2]
    with pytest.raises(LdmError, match="concept: 'pear' is none of the 3 that the judge was taught"):
        told.number("pear")


def test_differences_are_rms_from_nought_to_one():
    pictures = torch.rand(4, 3, 5, 6) * 2 - 1
    levels = (pictures.double().numpy() + 1) / 2
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = [np.sqrt(((levels[i] - levels[j]) ** 2).mean()) for i, j in pairs]
    np.testing.assert_allclose(differences(pictures), expected, rtol=1e-5)
    assert float(differences(torch.stack([-torch.ones(3, 4, 4), torch.ones(3, 4, 4)]))) == pytest.approx(1)


def test_variations(told):
    pictures = saying([[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.9, 0.1, 0.0]])
    found = judge_variations(told, pictures, "red apple")
    assert found.kept == 0.75 and found.kept_in_5 == 1
    apart = [np.sqrt(((a - b) ** 2).mean()) / 2 for k, a in enumerate(pictures.numpy()) for b in pictures.numpy()[:k]]
    assert found.difference == pytest.approx(np.mean(apart), rel=1e-5)
    assert found.closest == pytest.approx(min(apart), rel=1e-5)
    assert judge_variations(told, pictures[[0, 0]], "clay").closest == 0
    with pytest.raises(LdmError, match="variations: found 1, expected two or more"):
        judge_variations(told, pictures[:1], "clay")


def test_textdiffs(told):
    """Moved outright; moved between the two, though a third is likelier; not moved; there from the start."""
    before = saying([[0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    after = saying([[0.1, 0.8, 0.1], [0.1, 0.3, 0.6], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    found = judge_textdiffs(told, before, after, ["red apple"] * 4, ["1f34f"] * 4)
    assert (found.outright, found.between) == (0.25, 0.5)
    back = judge_textdiffs(told, after[:1], before[:1], ["green apple"], ["red apple"])
    assert (back.outright, back.between) == (1, 1)
    with pytest.raises(LdmError, match="tries: found 4 and 4 pictures, 3 sources and 4 targets"):
        judge_textdiffs(told, before, after, ["clay"] * 3, ["clay"] * 4)
    with pytest.raises(LdmError, match="tries: found 0 and 0 pictures"):
        judge_textdiffs(told, before[:0], after[:0], [], [])

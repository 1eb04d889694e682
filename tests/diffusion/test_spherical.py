"""The arc between vectors: its ends, its evenness, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.spherical import along_arc


def rows(seed: int, count: int = 3, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double()).clamp(-1, 1).acos()


def test_a_quarter_circle():
    start, end = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for share in (0.0, 0.25, 1 / 3, 0.5, 1.0):
        turned = math.pi / 2 * share
        expected = torch.tensor([[2 * math.cos(turned), 2 * math.sin(turned)]])
        torch.testing.assert_close(along_arc(start, end, share), expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_angle_and_length_grow_evenly(seed, share):
    start, end = rows(seed), 3 * rows(seed + 1)
    middle = along_arc(start, end, share)
    whole = angle(start, end)
    torch.testing.assert_close(angle(start, middle), share * whole, rtol=0, atol=2e-3)
    torch.testing.assert_close(angle(middle, end), (1 - share) * whole, rtol=0, atol=2e-3)
    lengths = torch.lerp(start.norm(dim=1), end.norm(dim=1), share)
    torch.testing.assert_close(middle.norm(dim=1), lengths)
    torch.testing.assert_close(middle, along_arc(end, start, 1 - share), rtol=1e-4, atol=1e-5)


def test_the_ends_are_the_vectors_bit_for_bit():
    start, end = rows(0), rows(1)
    assert torch.equal(along_arc(start, end, 0.0), start) and torch.equal(along_arc(start, end, 1.0), end)


def test_all_numbers_of_a_row_are_one_vector():
    start, end = rows(0, 2, 24), rows(1, 2, 24)
    shaped = along_arc(start.reshape(2, 4, 3, 2), end.reshape(2, 4, 3, 2), 0.3)
    assert torch.equal(shaped.reshape(2, 24), along_arc(start, end, 0.3))
    assert shaped.shape == (2, 4, 3, 2)


def test_vectors_of_one_direction():
    start = rows(0)
    torch.testing.assert_close(along_arc(start, start, 0.4), start)
    torch.testing.assert_close(along_arc(start, 2 * start, 0.5), 1.5 * start)
    near = start + 1e-6 * rows(1)
    assert torch.isfinite(along_arc(start, near, 0.5)).all()


def test_where_there_is_no_arc():
    start = rows(0)
    with pytest.raises(ValueError, match="opposite"):
        along_arc(start, -2 * start, 0.5)
    with pytest.raises(ValueError, match="length 0"):
        along_arc(start, torch.zeros_like(start), 0.5)

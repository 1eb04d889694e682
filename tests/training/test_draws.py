"""Which pictures and captions a batch is of: by their shares, and none that is held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.training.draws import NO_CAPTION, Draws, draws_from

COUNT = 20_000


@pytest.fixture
def draws() -> Draws:
    """Six pictures with 1, 2, 3, 1, 2 and 3 captions, of which every second may be mirrored; 0, 3 and 5 held out."""
    first = np.cumsum([0, 1, 2, 3, 1, 2, 3])
    share = np.array([5.0, 1, 2, 5, 1, 5])
    return draws_from(np.arange(6) % 2 == 0, first, [0, 3, 5], share)


@pytest.mark.parametrize(("draw", "picture"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.75, 4), (1 - 2**-24, 4)])
def test_a_picture_has_the_draws_from_its_lower_end_on(
    draw: float, picture: int, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities up to each picture: 0, 1/4, 3/4, 3/4, 1, 1. A draw of exactly 0 is no held-out picture's."""
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), draw))
    assert draws.pictures(2, torch.Generator()) == [picture] * 2


def test_shares_captions_and_mirroring(draws: Draws) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = draws.told(draws.pictures(COUNT, generator), generator, 0.3)
    share = np.bincount(drawn.pictures, minlength=6) / COUNT
    np.testing.assert_allclose(share, [0, 1 / 4, 1 / 2, 0, 1 / 4, 0], atol=0.02)
    assert not drawn.mirrored[drawn.pictures % 2 == 1].any()
    assert drawn.mirrored[drawn.pictures % 2 == 0].mean() == pytest.approx(0.5, abs=0.02)
    for picture, rows in ((1, [1, 2]), (2, [3, 4, 5]), (4, [7, 8])):
        counts = np.bincount(drawn.captions[drawn.pictures == picture])
        assert np.flatnonzero(counts).tolist() == rows
        np.testing.assert_allclose(counts[rows] / counts.sum(), 1 / len(rows), atol=0.02)
    left_out = drawn.rows == NO_CAPTION
    assert left_out.mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(drawn.rows[~left_out], drawn.captions[~left_out])


def test_all_alike_where_no_share_is_given() -> None:
    draws = draws_from(np.zeros(4, bool), np.arange(5), [1], None)
    found = np.bincount(draws.pictures(COUNT, torch.Generator().manual_seed(0)), minlength=4) / COUNT
    np.testing.assert_allclose(found, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.02)

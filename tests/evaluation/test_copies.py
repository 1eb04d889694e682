"""Planted copies are found, fresh pictures of the same kind are not called copies, and nearest means nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.copies import BLOCK, CALLED_SAME, NO_COPY, Places, check_copies


def pictures(count: int, seed: int, kinds: int = 4, width: int = 64) -> Tensor:
    """Rows of a mixture: some kinds of pictures, which share most of what they are."""
    generator = torch.Generator().manual_seed(seed)
    centers = 0.7 * torch.randn(kinds, width, generator=torch.Generator().manual_seed(99))
    kind = torch.randint(kinds, (count,), generator=generator)
    return centers[kind] + torch.randn(count, width, generator=generator)


def vectors(rows: Tensor) -> Tensor:
    """What stands in for CLIP: unit vectors of a fixed linear map."""
    generator = torch.Generator().manual_seed(7)
    return F.normalize(rows @ torch.randn(rows.shape[1], 32, generator=generator), dim=1)


def places(rows: Tensor) -> Places:
    return Places(rows.view(len(rows), 4, 4, -1), vectors(rows))


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("train", "held_out"), [(4, 1), (12, 3), (60, 15), (BLOCK + 40, 30)])
def test_planted_copies_are_found(noise: float, train: int, held_out: int):
    shown = pictures(train, 0)
    copied = [0, train // 2, train - 1]
    generator = torch.Generator().manual_seed(5)
    planted = shown[copied] + noise * torch.randn(3, 64, generator=generator)
    samples = torch.cat([pictures(5, 3), planted])
    found = check_copies(places(samples), places(shown), places(pictures(held_out, 1)))
    assert [copy.near for copy in found.nearest] == [False] * 5 + [True] * 3
    assert [copy.picture for copy in found.nearest[5:]] == copied
    assert {copy.sample for copy in found.copies} == {5, 6, 7}
    assert "3 of 8 samples are near copies of training pictures: sample" in found.sentences[0]
    assert (train + held_out < 8) == any("rule of thumb" in words for words in found.sentences)


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize(("train", "held_out"), [(4, 1), (12, 3), (50, 12)])
def test_fresh_pictures_are_seldom_called_copies(width: int, train: int, held_out: int):
    """At most two in a hundred, and for pictures of as many numbers as real ones have, never. 600 of 30 sets."""
    called = 0
    for seed in range(30):
        parts = (pictures(n, 100 * seed + i, width=width) for i, n in enumerate((20, train, held_out)))
        samples, shown, unseen = (Places(rows) for rows in parts)
        called += len(check_copies(samples, shown, unseen).copies)
    assert called <= {16: 12, 64: 0}[width]


def test_a_mirrored_copy_is_known_by_clip():
    """Its latent lies nowhere near, its vector does; and the picture that is named is the one CLIP saw."""
    shown, samples = pictures(40, 0), pictures(4, 3)
    seen = vectors(samples)
    seen[2] = F.normalize(vectors(shown[17:18]) + 0.02 * torch.randn(1, 32), dim=1)
    found = check_copies(Places(samples, seen), Places(shown, vectors(shown)), places(pictures(10, 1)))
    assert [copy.near for copy in found.nearest] == [False, False, True, False]
    assert found.nearest[2].picture == 17 and found.nearest[2].distance > found.distance_limit
    assert "sample 3 of picture 18 (CLIP's cosine 0.99, moved or mirrored)" in found.sentences[0]
    assert found.cosine_limit is not None and (found.nearest[2].cosine or 0) > found.cosine_limit >= CALLED_SAME


def test_nearest_by_brute_force():
    shown, samples = pictures(70, 0).double().numpy(), pictures(2 * BLOCK + 3, 2).double().numpy()
    found = check_copies(Places(torch.tensor(samples)), Places(torch.tensor(shown)), Places(torch.zeros(0)))
    distance = np.linalg.norm(samples[:, None] - shown, axis=2)
    nearest = distance.argmin(axis=1)
    assert [copy.picture for copy in found.nearest] == nearest.tolist()
    others = [np.sort(np.delete(row, i)) for row, i in zip(distance, nearest, strict=True)]
    expected = [row[i] / other[(len(other) - 1) // 2] for row, i, other in zip(distance, nearest, others, strict=True)]
    assert [copy.distance for copy in found.nearest] == pytest.approx(expected, rel=1e-4)
    assert all(copy.cosine is None for copy in found.nearest) and found.cosine_limit is None


def test_duplicates_in_the_set_do_not_hide_copies():
    """A third of the training pictures are there twice, as in a careless folder."""
    once = pictures(30, 0)
    shown = torch.cat([once, once[:10] + 0.01])
    copied = once[[0, 20]] + 0.3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
    found = check_copies(places(copied), places(shown), places(pictures(6, 1)))
    assert all(copy.near for copy in found.nearest)


def test_pictures_that_are_all_much_alike_are_not_all_copies():
    """Samples of one subject on one background are near to all pictures of it, and to none more than to others."""
    base = 20 * pictures(1, 0)
    shown, samples, unseen = (base + pictures(n, i) for i, n in enumerate((12, 8, 4)))
    found = check_copies(places(samples), places(shown), places(unseen))
    assert not [copy for copy in found.nearest if copy.distance < found.distance_limit]


def test_words():
    shown = pictures(20, 0)
    none = check_copies(places(pictures(16, 2)), places(shown), places(pictures(6, 1)))
    assert none.sentences == ("None of 16 samples is a near copy of a training picture.",)
    assert none.distance_limit <= NO_COPY
    names = [f"cat {i}\x1b[2J.png" for i in range(20)]
    one = check_copies(places(torch.cat([pictures(3, 2), shown[4:5]])), places(shown), places(pictures(6, 1)), names)
    assert one.sentences == (
        "1 of 4 samples is a near copy of a training picture: sample 4 of cat 4\\x1b[2J.png (0% of the usual distance, "
        "CLIP's cosine 1.00).",
    )
    many = check_copies(places(shown), places(shown), places(pictures(6, 1)))
    assert "20 of 20 samples are near copies" in many.sentences[0] and many.sentences[0].endswith("; and 12 more.")


def test_errors():
    with pytest.raises(LdmError, match="found 2"):
        check_copies(places(pictures(1, 0)), places(pictures(2, 1)), places(pictures(1, 2)))
    bad = pictures(4, 0)
    bad[1, 2] = torch.nan
    with pytest.raises(LdmError, match="finite"):
        check_copies(Places(bad), places(pictures(5, 1)), places(pictures(1, 2)))

"""Philox against its authors' numbers, AUTOMATIC1111's, and a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.diffusion.philox import Philox, philox

# Random123's kat_vectors: counter, key, result of philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_words_are_the_known_ones(counter, key, expected):
    a, b, c, d = (np.array([word, 7], dtype=np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox((a, b, c, d), key)) == expected


def test_normal_numbers_are_those_of_automatic1111():
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    assert torch.allclose(Philox(0).randn((3, 4)), torch.tensor(expected), rtol=0, atol=1e-8)


def test_numbers_are_unit_normal_and_new_at_every_call_and_seed():
    generators = [Philox(seed) for seed in (0, 1, 2**32, 2**63 - 1)]
    draws = torch.stack([g.randn((20_000,)) for g in (*generators, *generators)])
    assert torch.allclose(torch.corrcoef(draws), torch.eye(8), atol=0.03)
    assert torch.allclose(draws.std(dim=1), torch.ones(8), atol=0.03)
    assert torch.allclose(draws.mean(dim=1), torch.zeros(8), atol=0.03)


def test_a_number_depends_on_its_place_alone():
    assert torch.equal(Philox(5).randn((4, 6, 6)).flatten()[:50], Philox(5).randn((50,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 3])
def test_numbers_are_those_that_a_gpu_draws(seed):
    ours, theirs = Philox(seed), torch.Generator("cuda").manual_seed(seed)
    for shape in ((4, 64, 64), (3, 5)):
        drawn = torch.randn(shape, generator=theirs, device="cuda").cpu()
        assert torch.allclose(ours.randn(shape), drawn, rtol=0, atol=1e-4)

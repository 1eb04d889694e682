"""Noise that depends on the seed of its own picture alone."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.noise import per_image_noise, start_noise

SHAPE = (3, 8, 6)


def test_an_image_has_the_same_noise_in_any_batch():
    together, alone = per_image_noise(SHAPE, [5, 9, 7]), per_image_noise(SHAPE, [9])
    assert torch.equal(together.start[1], alone.start[0])
    for _ in range(3):
        assert torch.equal(together(2.0, 1.0)[1], alone(2.0, 1.0)[0])


def test_the_start_is_drawn_first_and_the_steps_follow_from_the_same_generator():
    noise = per_image_noise(SHAPE, [11])
    generator = torch.Generator().manual_seed(11)
    for drawn in (noise.start, noise(3.0, 2.0), noise(2.0, 1.0)):
        assert torch.equal(drawn[0], torch.randn(*SHAPE, generator=generator))
    assert torch.equal(start_noise(SHAPE, [11]), noise.start)


def test_noise_is_unit_and_fresh_at_every_call():
    noise = per_image_noise((20_000,), [1, 2])
    draws = torch.cat([noise.start, noise(2.0, 1.0), noise(1.0, 0.5)])
    assert draws.dtype == torch.float32
    assert torch.allclose(torch.corrcoef(draws), torch.eye(6), atol=0.03)
    assert torch.allclose(draws.std(dim=1), torch.ones(6), atol=0.03)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = start_noise(SHAPE, [3])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(start_noise(SHAPE, [3]), first)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_all_seeds_a_request_may_have(seed):
    assert bool(start_noise((4,), [seed]).isfinite().all())


def test_neighbouring_seeds_are_unrelated():
    draws = start_noise((10_000,), list(range(8)))
    assert torch.allclose(torch.corrcoef(draws), torch.eye(8), atol=0.05)

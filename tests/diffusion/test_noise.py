"""Noise that depends on the seed of its own picture alone."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.noise import per_image_noise, start_noise
from ldm.diffusion.philox import Philox

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


def test_philox_starts_and_goes_on_as_automatic1111_does():
    """Its ImageRNG: one generator for each picture, from which the steps draw on."""
    noise = per_image_noise(SHAPE, [4, 2**40], rng="philox")
    generators = Philox(4), Philox(2**40)
    for drawn in (noise.start, noise(3.0, 2.0), noise(2.0, 1.0)):
        assert torch.equal(drawn, torch.stack([g.randn(SHAPE) for g in generators]))


@pytest.mark.parametrize("shape", [SHAPE, (4, 8, 8)])
def test_comfy_has_one_seed_for_a_batch(shape):
    whole = torch.randn(4, *shape, generator=torch.Generator().manual_seed(8))
    together = per_image_noise(shape, [8] * 4, rng="comfy")
    assert torch.equal(together.start, whole)
    for row in range(4):
        alone = per_image_noise(shape, [8], rng="comfy", batch_index=row)
        assert torch.equal(alone.start[0], whole[row])
        assert torch.equal(alone(2.0, 1.0)[0], per_image_noise(shape, [8] * 4, rng="comfy")(2.0, 1.0)[row])


def test_comfy_alone_at_an_odd_size_is_a_batch_of_one():
    whole = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(8))
    assert torch.equal(per_image_noise((4, 5, 7), [8], rng="comfy").start, whole)


def test_comfy_draws_the_steps_of_a_single_picture_as_on_a_cpu():
    """comfy/k_diffusion/sampling.py: on a CPU the sampler's own generator has the next seed."""
    generator = torch.Generator().manual_seed(9)
    noise = per_image_noise((4, 8, 8), [8], rng="comfy")
    for _ in range(2):
        assert torch.equal(noise(2.0, 1.0), torch.randn(1, 4, 8, 8, generator=generator))


def test_paths_of_one_comfy_batch_differ():
    noise = per_image_noise(SHAPE, [8, 8], rng="comfy", brownian=True)(2.0, 1.0)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    alone = per_image_noise(SHAPE, [8], rng="comfy", batch_index=1, brownian=True)(2.0, 1.0)
    assert torch.equal(alone[0], noise[1])


@pytest.mark.parametrize("rng", ["cpu", "philox", "comfy"])
def test_a_variation_goes_along_the_arc_between_two_starts(rng):
    low, high = (per_image_noise((4, 9, 6), [seed], rng=rng).start for seed in (1, 2))
    assert torch.equal(per_image_noise((4, 9, 6), [1], rng=rng, variation=([2], 0.0)).start, low)
    assert torch.allclose(per_image_noise((4, 9, 6), [1], rng=rng, variation=([2], 1.0)).start, high, atol=1e-5)
    some = per_image_noise((4, 9, 6), [1], rng=rng, variation=([2], 0.3)).start
    for channel in range(4):
        for column in range(6):
            a, b, c = (t[0, channel, :, column].double() for t in (low, high, some))
            angle = torch.acos(a @ b / a.norm() / b.norm())
            expected = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
            assert torch.allclose(c, expected, atol=1e-5)


def test_a_variation_keeps_the_noise_unit_and_leaves_the_steps_alone():
    plain, varied = per_image_noise((4, 64, 64), [1]), per_image_noise((4, 64, 64), [1], variation=([2], 0.5))
    assert float(varied.start.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(plain(2.0, 1.0), varied(2.0, 1.0))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8), (6,)])
def test_a_variation_towards_itself_is_itself(shape):
    start = start_noise(shape, [3])
    assert torch.allclose(per_image_noise(shape, [3], variation=([3], 0.4)).start, start, atol=1e-5)

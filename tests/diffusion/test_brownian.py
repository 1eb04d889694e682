"""A Brownian path is normal, rough, the same however it is asked, and holds a sampler of the SDE to one picture."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torchsde
from torch import Tensor

from ldm.diffusion.brownian import BrownianPath
from ldm.diffusion.noise import per_image_noise
from ldm.samplers import Sample
from ldm.samplers.dpmpp import dpmpp_2m_sde, dpmpp_sde
from ldm.samplers.euler import euler_ancestral

LEVELS = [14.61, 9.3, 8.0, 5.01, 2.0, 1.9, 1.0, 0.4, 0.0292, 0.0]


def increments(path: BrownianPath, levels: list[float]) -> Tensor:
    return torch.stack([path.increment(a, b) for a, b in pairwise(levels)])


def test_increments_are_independent_and_have_the_variance_of_their_length():
    lengths = torch.tensor(LEVELS[:-1]) - torch.tensor(LEVELS[1:])
    unit = increments(BrownianPath((40_000,), 3), LEVELS) / lengths.sqrt()[:, None]
    assert torch.allclose(torch.corrcoef(unit), torch.eye(len(lengths)), atol=0.025)
    assert torch.allclose(unit.std(dim=1), torch.ones(len(lengths)), atol=0.02)
    assert torch.allclose(unit.mean(dim=1), torch.zeros(len(lengths)), atol=0.025)
    assert torch.allclose(unit.pow(4).mean(dim=1), torch.full((len(lengths),), 3.0), atol=0.25)


def test_covariance_is_that_of_torchsde():
    levels = [0.3, 0.7, 1.0, 1.2, 3.1, 3.3, 7.9]
    path = BrownianPath((20_000,), 11)
    theirs = torchsde.BrownianInterval(0.0, 8.0, size=(20_000, 1), entropy=5)
    ours_at = torch.stack([path.increment(level, 0.0) for level in levels])
    theirs_at = torch.stack([theirs(0.0, level)[:, 0] for level in levels])  # pyright: ignore[reportIndexIssue]
    at = torch.tensor(levels)
    exact = torch.minimum(at[:, None], at[None])
    scale = (at[:, None] * at[None]).sqrt()
    for values in (ours_at, theirs_at):
        assert float(((torch.cov(values) - exact) / scale).abs().max()) < 0.04


def test_the_path_is_rough_down_to_small_steps():
    """Quadratic variation: the squares of the increments of one path add up to its length."""
    levels = [2 - i / 1000 for i in range(1001)]
    variation = increments(BrownianPath((8,), 4), levels).square().sum(dim=0)
    assert torch.allclose(variation, torch.ones(8), atol=0.15)


def test_increments_add_up():
    path = BrownianPath((4, 5), 9)
    whole, parts = path.increment(LEVELS[0], LEVELS[-1]), increments(path, LEVELS).sum(dim=0)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.equal(path.increment(3.0, 1.3), -path.increment(1.3, 3.0))
    noise = per_image_noise((4, 5), [9], brownian=True)
    weighted = 2 * noise(9.0, 5.0) + 1 * noise(5.0, 4.0)
    assert torch.allclose(weighted, math.sqrt(5) * per_image_noise((4, 5), [9], brownian=True)(9.0, 4.0), atol=1e-5)


def test_the_order_and_number_of_questions_do_not_matter():
    pairs = list(pairwise(LEVELS))
    there, back = BrownianPath((3, 4), 7), BrownianPath((3, 4), 7)
    downwards = [there.increment(*pair) for pair in pairs]
    upwards = [back.increment(*pair) for pair in reversed(pairs)]
    assert all(torch.equal(a, b) for a, b in zip(downwards, reversed(upwards), strict=True))
    late = BrownianPath((3, 4), 7).increment(*pairs[5])
    assert torch.equal(late, downwards[5])


def test_the_path_is_continuous_at_the_powers_of_two():
    path = BrownianPath((500,), 2)
    for level in (4.0, 1.0, 0.25, 2.0**-24):
        assert float(path.increment(level * (1 + 1e-6), level * (1 - 1e-6)).abs().max()) < 0.02 * math.sqrt(level)


def test_paths_of_seeds_places_and_start_noise_are_unrelated():
    size = (20_000,)
    paths = [BrownianPath(size, seed, place) for seed, place in ((0, 0), (1, 0), (0, 1), (2**63 - 1, 0))]
    draws = torch.stack([*(p.increment(2.0, 1.0) for p in paths), per_image_noise(size, [0]).start[0]])
    assert torch.allclose(torch.corrcoef(draws), torch.eye(5), atol=0.03)


@pytest.mark.parametrize("rng", ["cpu", "philox"])
def test_an_image_has_the_same_path_in_any_batch(rng):
    together = per_image_noise((3, 4), [5, 6, 7], rng=rng, brownian=True)
    alone = per_image_noise((3, 4), [6], rng=rng, brownian=True)
    assert torch.equal(together(3.0, 2.0)[1], alone(3.0, 2.0)[0])
    assert torch.equal(together.start[1], alone.start[0])


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for data N(0.7, 0.6^2)."""
    return 0.7 + 0.36 / (0.36 + sigma.double()[:, None] ** 2) * (x - 0.7)


def picture(sampler: Sample, steps: int, *, brownian: bool) -> Tensor:
    sigmas = torch.linspace(10 ** (1 / 7), 0.05 ** (1 / 7), steps + 1, dtype=torch.float64).pow(7).float()
    noise = per_image_noise((200,), [1], brownian=brownian)
    *_, last = sampler(gaussian, 10 * noise.start.double(), sigmas, noise)
    return last.x


def differences(sampler: Sample, *, brownian: bool) -> list[float]:
    """How far the pictures of 20, 40 and 80 steps are from that of 320, as a share of its contrast."""
    fine, *others = (picture(sampler, steps, brownian=brownian) for steps in (320, 20, 40, 80))
    return [float((other - fine).square().mean().sqrt() / fine.std()) for other in others]


@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, dpmpp_sde, euler_ancestral])
def test_more_steps_give_the_same_picture_better(sampler):
    """Pathwise convergence; with noise of its own for every step each number of steps has another picture."""
    held, loose = differences(sampler, brownian=True), differences(sampler, brownian=False)
    assert held[0] > 1.5 * held[1] > 1.5**2 * held[2]
    assert min(loose) > 5 * held[0]

"""Solvers against closed forms: data whose ideal denoiser, whose trajectories and whose moments are known.

Gaussian data N(mu, c^2): the state at sigma is N(mu, c^2 + sigma^2), E[x0 | x] is linear in x, and the probability-flow
ODE keeps (x - mu) / sqrt(c^2 + sigma^2). A mixture of Gaussians on a line has a denoiser that is not linear; there the
ODE keeps the quantile of x, whatever the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ldm.samplers import SAMPLERS, Sample
from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm, ddpm_learned
from ldm.samplers.dpm2 import dpm2_ancestral
from ldm.samplers.dpmpp import dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.lcm import lcm
from ldm.samplers.multistep import deis, lms
from ldm.samplers.tcd import tcd
from ldm.samplers.unipc import unipc
from ldm.types import Prediction

HIGH, LOW = 10.0, 0.1

MU, C2 = 0.7, 0.36
WEIGHTS, MEANS, VARIANCES = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.5, 1.0], [0.16, 0.49]))

ODE_SAMPLERS: list[tuple[str, Sample, float]] = [
    *((name, s.sample, s.order) for name, s in SAMPLERS.items() if not s.stochastic and name not in ("lms", "deis")),
    ("unipc, order 1", partial(unipc, order=1), 2),
    ("unipc, bh1", partial(unipc, scaling="bh1"), 3),
    ("dpmpp-sde without noise", partial(dpmpp_sde, eta=0.0), 2),
    ("dpmpp-2m-sde without noise", partial(dpmpp_2m_sde, eta=0.0), 2),
    ("dpmpp-2s-a without noise", partial(dpmpp_2s_ancestral, eta=0.0), 2),
]
SDE_SAMPLERS: list[tuple[str, Sample, int]] = [
    *((name, s.sample, s.order) for name, s in SAMPLERS.items() if s.stochastic and s.order),
    ("ddim, eta 1", partial(ddim, eta=1.0), 1),
    ("ddpm, large variance", partial(ddpm, variance="large"), 1),
]


def levels(steps: int, low: float = LOW, high: float = HIGH) -> Tensor:
    """Karras' spacing of [high, low]: smooth, and even neither in sigma nor in log sigma."""
    return torch.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1, dtype=torch.float64).pow(7).float()


def silent(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for N(MU, C2)."""
    variance = sigma.double()[:, None] ** 2
    return MU + C2 / (C2 + variance) * (x - MU)


def gaussian_trajectory(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    return MU + math.sqrt((C2 + sigma_next**2) / (C2 + sigma**2)) * (x - MU)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for the mixture: x (B, 1)."""
    variance = VARIANCES + sigma.double()[:, None] ** 2
    share = torch.softmax(WEIGHTS.log() - variance.log() / 2 - (x - MEANS) ** 2 / (2 * variance), dim=1)
    return (share * (MEANS + VARIANCES / variance * (x - MEANS))).sum(dim=1, keepdim=True)


def mixture_quantile(x: Tensor, sigma: float) -> Tensor:
    deviations = (VARIANCES + sigma**2).sqrt()
    return (WEIGHTS * torch.special.ndtr((x - MEANS) / deviations)).sum(dim=1, keepdim=True)


def mixture_trajectory(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The point with the same quantile at sigma_next, by bisection."""
    quantile = mixture_quantile(x, sigma)
    low, high = torch.full_like(x, -100.0), torch.full_like(x, 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = mixture_quantile(middle, sigma_next) > quantile
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def order(error: Callable[[int], float], steps: int) -> float:
    """By how many powers of two the error falls when the steps are halved in length."""
    return math.log2(error(steps) / error(2 * steps))


@pytest.mark.parametrize(
    ("denoise", "trajectory"),
    [(gaussian, gaussian_trajectory), (mixture, mixture_trajectory)],
    ids=["gaussian", "mixture"],
)
@pytest.mark.parametrize(("sampler", "claim"), [s[1:] for s in ODE_SAMPLERS], ids=[s[0] for s in ODE_SAMPLERS])
def test_ode_samplers_converge_with_the_order_they_claim(denoise, trajectory, sampler, claim):
    x = torch.tensor([[8.0], [-3.0], [0.5], [-14.0]], dtype=torch.float64)

    def error(steps: int) -> float:
        sigmas = levels(steps)
        *_, last = sampler(denoise, x, sigmas, silent)
        return float((last.x - trajectory(x, float(sigmas[0]), float(sigmas[-1]))).abs().max())

    assert error(160) < 0.05
    assert order(error, 160) == pytest.approx(claim, abs=0.12)


def fine_start(steps: int) -> Tensor:
    """`levels`, the first step of them cut into nine that grow fourfold."""
    sigmas = levels(steps).double()
    cuts = 4.0 ** -torch.arange(8, 0, -1, dtype=torch.float64)
    return torch.cat([sigmas[:1], sigmas[0] + (sigmas[1] - sigmas[0]) * cuts, sigmas[1:]])


@pytest.mark.parametrize(
    ("denoise", "trajectory"),
    [(gaussian, gaussian_trajectory), (mixture, mixture_trajectory)],
    ids=["gaussian", "mixture"],
)
@pytest.mark.parametrize(("sampler", "order_of"), [(lms, 4), (lms, 3), (lms, 2), (deis, 3), (deis, 2)])
def test_multistep_methods_have_their_order_but_for_their_first_step(denoise, trajectory, sampler, order_of):
    """That one is Euler's, and its error of order 2 stays, unless it is a very short one."""
    x = torch.tensor([[8.0], [-3.0], [0.5], [-14.0]], dtype=torch.float64)
    sampler = partial(sampler, order=order_of)

    def error(sigmas: Tensor) -> float:
        *_, last = sampler(denoise, x, sigmas, silent)
        return float((last.x - trajectory(x, float(sigmas[0]), float(sigmas[-1]))).abs().max())

    assert order(lambda steps: error(fine_start(steps)), 160) == pytest.approx(order_of, abs=0.12)
    # From a level where the trajectory bends more, its first step shows.
    assert order(lambda steps: error(levels(steps, high=2.0)), 160) == pytest.approx(2, abs=0.2)


def test_unipc_of_order_3_beats_order_2_and_is_held_back_by_its_start():
    x = torch.tensor([[8.0], [-3.0], [0.5]], dtype=torch.float64)

    def error(predictor_order: int, steps: int) -> float:
        sigmas = levels(steps)
        *_, last = unipc(mixture, x, sigmas, silent, order=predictor_order)
        return float((last.x - mixture_trajectory(x, float(sigmas[0]), float(sigmas[-1]))).abs().max())

    assert error(3, 80) < error(2, 80) / 3
    assert 3.0 < order(partial(error, 3), 80) < 4.2


def moments(sampler: Sample, x: float, spread: float, sigmas: Tensor) -> tuple[float, float]:
    """Mean and variance of a sampler's output on Gaussian data from a start N(x, spread^2), without drawing anything.

    The output is affine in the start and in every noise, so one row of the batch moves each of them by one deviation:
    the variance is the sum of the squares of what comes of it.
    """
    rows = 2 * len(sigmas) + 2
    unit = iter(torch.eye(rows, dtype=torch.float64)[2:, :, None])
    start = torch.full((rows, 1), x, dtype=torch.float64)
    start[1] += spread
    *_, last = sampler(gaussian, start, sigmas, lambda sigma, sigma_next: next(unit))
    return float(last.x[0]), float(((last.x[1:] - last.x[0]) ** 2).sum())


@pytest.mark.parametrize(("sampler", "claim"), [s[1:] for s in SDE_SAMPLERS], ids=[s[0] for s in SDE_SAMPLERS])
def test_sde_samplers_converge_to_the_right_mean_and_variance(sampler, claim):
    """Given the state at the top, the state below is normal, with the moments of the time-reversed forward process.

    Along that process E[x0 | x] is a martingale, so on Gaussian data the mean is exact; the variance bears the bias.
    Not so where the noise comes after a step that has looked ahead without it: there the mean has a bias too.
    """
    start = 6.0
    looks_ahead = sampler in (dpm2_ancestral, dpmpp_2s_ancestral)

    def bias(steps: int) -> float:
        sigmas = levels(steps)
        top, bottom = C2 + float(sigmas[0]) ** 2, C2 + float(sigmas[-1]) ** 2
        mean, variance = moments(sampler, start, 0.0, sigmas)
        wanted = MU + bottom / top * (start - MU)
        if looks_ahead:
            return abs(mean - wanted)
        assert mean == pytest.approx(wanted, rel=1e-8)
        return abs(variance * top / (bottom * (top - bottom)) - 1)

    assert bias(160) < 0.04
    assert order(bias, 160) == pytest.approx(claim, abs=0.12)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    "sampler",
    [ddim, euler_ancestral, dpm2_ancestral, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde],
)
def test_any_eta_has_the_same_marginals(sampler, eta):
    def error(steps: int) -> float:
        sigmas = levels(steps)
        mean, variance = moments(partial(sampler, eta=eta), MU, math.sqrt(C2 + HIGH**2), sigmas)
        assert mean == pytest.approx(MU, abs=1e-6)
        return abs(variance / (C2 + float(sigmas[-1]) ** 2) - 1)

    assert error(320) < 0.02
    assert error(320) < 0.6 * error(160)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("sampler", [dpm2_ancestral, dpmpp_2s_ancestral])
def test_second_order_ancestral_samplers_have_marginals_of_order_2(sampler, eta):
    """Their bias of order 1 is in how the ends of a path belong together, and not in how the pictures spread."""

    def error(steps: int) -> float:
        sigmas = levels(steps)
        _, variance = moments(partial(sampler, eta=eta), MU, math.sqrt(C2 + HIGH**2), sigmas)
        return abs(variance / (C2 + float(sigmas[-1]) ** 2) - 1)

    assert order(error, 160) == pytest.approx(2, abs=0.12)


@pytest.mark.parametrize("sampler", [s[1] for s in SDE_SAMPLERS], ids=[s[0] for s in SDE_SAMPLERS])
def test_sde_samplers_reach_data_that_is_not_gaussian(sampler):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, 10_000, 1, generator=generator, dtype=torch.float64)
    sigmas = torch.cat([levels(80, low=0.02), torch.zeros(1)])
    *_, last = sampler(mixture, HIGH * draw(), sigmas, lambda sigma, sigma_next: draw())
    mean = float(WEIGHTS @ MEANS)
    variance = float(WEIGHTS @ (VARIANCES + MEANS**2)) - mean**2
    assert float(last.x.mean()) == pytest.approx(mean, abs=0.05)
    assert float(last.x.var()) == pytest.approx(variance, rel=0.06)
    left = float((last.x < -0.5).double().mean())  # the share of the left hump, which moments alone do not show
    assert left == pytest.approx(float(mixture_quantile(torch.tensor([[-0.5]]), 0.0)), abs=0.015)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_learned_variance_can_be_exact_where_fixed_ones_are_not(steps):
    """The best variance of a step lies between the bounds; given that one, DDPM is exact with any number of steps."""
    sigmas = levels(steps)

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        at = float(sigma[0])
        to = float(sigmas[sigmas.tolist().index(at) + 1])
        best = (C2 + to**2) * (at**2 - to**2) / (C2 + at**2)
        small = to**2 * (at**2 - to**2) / at**2
        large = (at**2 - to**2) * (1 + to**2) / (1 + at**2)
        share = math.log(best / small) / math.log(large / small)
        assert 0 < share < 1
        return Prediction(gaussian(x, sigma), torch.full_like(x, share))

    def learned(denoise, x, sigmas, noise):
        return ddpm_learned(predict, x, sigmas, noise)

    bottom = C2 + float(sigmas[-1]) ** 2
    mean, variance = moments(learned, MU, math.sqrt(C2 + HIGH**2), sigmas)
    assert (mean, variance) == pytest.approx((MU, bottom), rel=1e-5)
    small, large = (
        moments(partial(ddpm, variance=v), MU, math.sqrt(C2 + HIGH**2), sigmas)[1] for v in ("small", "large")
    )
    assert small < 0.9 * bottom < 1.1 * bottom < large


def test_a_network_without_learned_variance_is_refused():
    with pytest.raises(ValueError, match="no learned variance"):
        next(ddpm_learned(lambda x, sigma: Prediction(x), torch.ones(1, 1), levels(2), silent))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_with_the_consistency_function_is_exact_in_any_number_of_steps(steps):
    def consistency_function(x: Tensor, sigma: Tensor) -> Tensor:
        return MU + (C2 / (C2 + sigma.double()[:, None] ** 2)).sqrt() * (x - MU)

    sigmas = torch.cat([levels(steps)[:-1], torch.zeros(1)])
    exact = partial(moments, x=MU, spread=math.sqrt(C2 + HIGH**2), sigmas=sigmas)
    assert exact(lambda _, *rest: lcm(consistency_function, *rest)) == pytest.approx((MU, C2), rel=1e-6)
    # The posterior mean is no consistency function: it always lands too near to the centre.
    assert exact(lcm)[1] < 0.9 * C2


def test_one_step_of_lcm_lands_where_the_trajectory_ends():
    x = torch.tensor([[8.0], [-3.0], [0.5]], dtype=torch.float64)

    def consistency_function(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture_trajectory(x, float(sigma[0]), 0.0)

    *_, jumped = lcm(consistency_function, x, torch.tensor([HIGH, 0.0]), silent)
    *_, walked = unipc(mixture, x, torch.cat([levels(200, low=0.001), torch.zeros(1)]), silent)
    assert torch.allclose(jumped.x, walked.x, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_tcd_keeps_the_noise_at_its_level_when_the_model_is_right(eta, steps):
    """For data that are one point every step's deviation is sigma_next, however it is shared out."""
    sigmas = levels(steps)
    spread = torch.eye(2 * steps + 2, dtype=torch.float64)[:, :, None]
    unit = iter(spread[1:])
    for step in tcd(lambda x, sigma: torch.zeros_like(x), HIGH * spread[0], sigmas, lambda *_: next(unit)):
        assert float(step.x.square().sum().sqrt()) == pytest.approx(step.sigma_next, rel=1e-6)


def test_tcd_lies_between_euler_and_lcm():
    x = torch.tensor([[8.0], [-3.0]], dtype=torch.float64)
    sigmas = levels(6, low=0.0)
    ends = []
    for sampler in (partial(tcd, eta=0.0), euler, partial(tcd, eta=1.0), lcm):
        *_, last = sampler(mixture, x, sigmas, lambda sigma, sigma_next: torch.ones_like(x))
        ends.append(last.x)
    assert torch.equal(ends[0], ends[1])
    assert torch.allclose(ends[2], ends[3], rtol=0.02)  # timestep 0 has a sigma of 0.03

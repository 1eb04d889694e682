"""DDIM run backwards against closed forms: where it ends, and how well DDIM undoes it.

Gaussian data N(MU, C2): E[x0 | x] is linear in x, and the probability-flow ODE keeps (x - MU) / sqrt(C2 + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import scaled_linear, zero_terminal_snr
from ldm.diffusion.sigmas import end_above_zero, leading, trailing
from ldm.samplers.ddim import ddim
from ldm.samplers.inversion import ddim_inversion
from ldm.types import Denoise

MU, C2 = 0.4, 0.5
DATA = torch.tensor([[1.1], [-0.8], [0.3], [2.0]], dtype=torch.float64)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    variance = sigma.double()[:, None] ** 2
    return MU + C2 / (C2 + variance) * (x - MU)


def two_points(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for data at -1 and 1, half and half: not linear."""
    return torch.tanh(x / sigma.double()[:, None] ** 2)


def rising(steps: int, low: float = 0.1, high: float = 10.0) -> Tensor:
    return torch.linspace(low ** (1 / 7), high ** (1 / 7), steps + 1, dtype=torch.float64).pow(7).float()


def silent(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("DDIM without eta asked for noise")


def inverted(denoise: Denoise, x: Tensor, sigmas: Tensor, refinements: int = 0) -> Tensor:
    *_, last = ddim_inversion(denoise, x, sigmas, refinements=refinements)
    return last.x


def given_back(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    *_, last = ddim(denoise, x, sigmas.flip(0), silent)
    return last.x


def order(error: Callable[[int], float], steps: int) -> float:
    """By how many powers of two the error falls when the steps are halved in length."""
    return math.log2(error(steps) / error(2 * steps))


@pytest.mark.parametrize("refinements", [0, 1])
def test_it_ends_on_the_true_path_with_order_1(refinements):
    def error(steps: int) -> float:
        sigmas = rising(steps)
        low, high = float(sigmas[0]), float(sigmas[-1])
        truth = MU + math.sqrt((C2 + high**2) / (C2 + low**2)) * (DATA - MU)
        return float((inverted(gaussian, DATA, sigmas, refinements) - truth).abs().max())

    assert error(200) < 0.3
    assert order(error, 200) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("refinements", [0, 1, 2])
@pytest.mark.parametrize("denoise", [gaussian, two_points])
def test_ddim_gives_the_start_back_with_an_order_more_for_each_refinement(denoise, refinements):
    start = DATA if denoise is gaussian else DATA.sign() * 0.97

    def error(steps: int) -> float:
        sigmas = rising(steps, low=0.3)
        return float((given_back(denoise, inverted(denoise, start, sigmas, refinements), sigmas) - start).abs().max())

    assert error(160) < 0.1
    assert order(error, 160) == pytest.approx(refinements + 1, abs=0.15)


def test_refined_to_the_end_the_inverse_is_exact():
    """Also over steps that are far too long: the two forms converge where they are used."""
    schedule = scaled_linear()
    for sigmas in (end_above_zero(leading(schedule, 8), schedule), rising(5, 0.03, 15).flip(0)):
        back = given_back(gaussian, inverted(gaussian, DATA, sigmas.flip(0), refinements=60), sigmas.flip(0))
        torch.testing.assert_close(back, DATA, rtol=0, atol=1e-9)


def test_levels_up_to_all_but_infinite_noise():
    """Zero terminal SNR: what stands for pure noise is a sigma of thousands."""
    sigmas = trailing(zero_terminal_snr(scaled_linear()), 50)[:-1].flip(0)
    back = given_back(gaussian, inverted(gaussian, DATA, sigmas, refinements=3), sigmas)
    assert float(sigmas[-1]) > 1000
    torch.testing.assert_close(back, DATA, rtol=0, atol=2e-2)


def test_inverted_noise_of_gaussian_data_is_unit_noise():
    """Deviation 1 at the top, whatever the data's: what `ldm.diffusion.state.start_state` scales."""
    data = MU + math.sqrt(C2) * torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = rising(400, 0.02, 50.0)
    noise = inverted(gaussian, data, sigmas, refinements=1) / math.sqrt(1 + 50.0**2)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)


def test_each_step_says_what_it_did():
    sigmas = rising(6)
    steps = list(ddim_inversion(gaussian, DATA, sigmas))
    levels = sigmas.tolist()
    assert [(step.index, step.sigma, step.sigma_next) for step in steps] == [
        (index, levels[index], levels[index + 1]) for index in range(6)
    ]
    first = DATA + (levels[1] - levels[0]) * (DATA - gaussian(DATA, torch.full((4,), levels[0]))) / levels[0]
    torch.testing.assert_close(steps[0].x, first)


@pytest.mark.parametrize("levels", [[0.0, 1.0], [2.0, 1.0], [1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, math.inf]])
def test_levels_that_cannot_be(levels):
    with pytest.raises(ValueError, match="sigmas must be"):
        list(ddim_inversion(gaussian, DATA, torch.tensor(levels)))

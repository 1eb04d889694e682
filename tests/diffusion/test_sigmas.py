"""Sigma schedules against diffusers and closed forms, and what all of them promise."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import scipy.stats
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.schedule import NOISE_SCHEDULES, NoiseSchedule, scaled_linear, zero_terminal_snr
from ldm.diffusion.sigmas import (
    SCHEDULES,
    align_your_steps,
    align_your_steps_sdxl,
    beta,
    beta_timesteps,
    end_above_zero,
    exponential,
    karras,
    kl_optimal,
    latent_consistency,
    leading,
    linspace,
    sgm_uniform,
    simple,
    trailing,
)

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusers_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


SCHEDULE = scaled_linear()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 151, 600, 999, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("schedule", [SCHEDULE, zero_terminal_snr(SCHEDULE)], ids=["sd", "zero-terminal-snr"])
def test_every_schedule_falls_to_zero_in_so_many_steps(schedule, name, steps):
    sigmas = SCHEDULES[name](schedule, steps)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-1]) == 0
    assert float(sigmas[0]) <= schedule.sigma_max * (1 + 1e-6)
    assert float(sigmas[-2]) >= schedule.sigma_min * (1 - 1e-6)
    if steps > 2:  # none leaves out more than the upper tenth of the timesteps
        assert float(schedule.timestep(sigmas[:1])) >= 900 * (1 - 1 / steps)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    process=st.sampled_from(sorted(NOISE_SCHEDULES)),
    terminal=st.booleans(),
    steps=st.integers(1, 1000),
)
def test_every_schedule_falls_strictly_for_any_steps_and_any_noise(name, process, terminal, steps):
    schedule = NOISE_SCHEDULES[process]()
    sigmas = SCHEDULES[name](zero_terminal_snr(schedule) if terminal else schedule, steps)
    assert sigmas.shape == (steps + 1,) and bool(sigmas.isfinite().all())
    assert bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) == 0


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"leading"}))
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_all_but_leading_start_at_the_top(name, steps):
    assert float(SCHEDULES[name](SCHEDULE, steps)[0]) == pytest.approx(SCHEDULE.sigma_max)


@pytest.mark.parametrize("steps", [2, 5, 20, 31])
@pytest.mark.parametrize(
    ("function", "config"),
    [
        (karras, {"use_karras_sigmas": True}),
        (exponential, {"use_exponential_sigmas": True}),
        (beta, {"use_beta_sigmas": True}),
        (leading, {"timestep_spacing": "leading", "steps_offset": 1}),
        (trailing, {"timestep_spacing": "trailing"}),
    ],
    ids=["karras", "exponential", "beta", "leading", "trailing"],
)
def test_sigmas_equal_those_of_diffusers_euler(function, config, steps):
    theirs = diffusers_scheduler("EulerDiscreteScheduler", **SD, **config)
    theirs.set_timesteps(steps)
    ours = function(NoiseSchedule(theirs.alphas_cumprod.double()), steps)
    assert torch.allclose(ours, theirs.sigmas, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 3, 16, 20, 30, 50, 77])
def test_leading_and_trailing_timesteps_equal_diffusers_ddim(steps):
    for function, config in (
        (leading, {"timestep_spacing": "leading", "steps_offset": 1}),
        (trailing, {"timestep_spacing": "trailing"}),
    ):
        theirs = diffusers_scheduler("DDIMScheduler", **SD, **config)
        theirs.set_timesteps(steps)
        ours = SCHEDULE.timestep(function(SCHEDULE, steps)[:-1])
        assert ours.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 50])
def test_lcm_timesteps_equal_diffusers(steps):
    theirs = diffusers_scheduler("LCMScheduler", **SD)
    theirs.set_timesteps(steps)
    ours = SCHEDULE.timestep(latent_consistency(SCHEDULE, steps)[:-1])
    assert ours.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [4, 10, 28])
def test_linspace_equals_diffusers_where_timesteps_are_whole(steps):
    theirs = diffusers_scheduler("EulerDiscreteScheduler", **SD, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    ours = linspace(NoiseSchedule(theirs.alphas_cumprod.double()), steps)
    assert torch.allclose(ours, theirs.sigmas, rtol=1e-5)


def test_sgm_uniform_is_even_in_the_timestep():
    timesteps = SCHEDULE.timestep(sgm_uniform(SCHEDULE, 4)[:-1])
    assert timesteps.tolist() == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-3)


def test_known_timesteps():
    def timesteps(name: str, steps: int) -> list[float]:
        return SCHEDULE.timestep(SCHEDULES[name](SCHEDULE, steps)[:-1]).tolist()

    assert timesteps("leading", 4) == [751, 501, 251, 1]
    assert timesteps("trailing", 4) == [999, 749, 499, 249]
    assert timesteps("linspace", 4) == [999, 666, 333, 0]
    assert timesteps("leading", 600)[0] == 999  # a stride of one would have begun at 600
    assert timesteps("leading", 1000)[-1] == 0  # no room for the offset


def test_karras_is_even_in_the_seventh_root():
    roots = karras(SCHEDULE, 9)[:-1].double() ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[0], rtol=1e-5)
    roots = karras(SCHEDULE, 9, rho=3)[:-1].double() ** (1 / 3)
    assert torch.allclose(roots.diff(), roots.diff()[0], rtol=1e-5)


def test_ending_above_zero():
    sigmas = end_above_zero(leading(SCHEDULE, 20), SCHEDULE)
    assert float(sigmas[-1]) == pytest.approx(SCHEDULE.sigma_min)
    assert torch.equal(sigmas[:-1], leading(SCHEDULE, 20)[:-1])
    assert torch.equal(end_above_zero(karras(SCHEDULE, 5), SCHEDULE), karras(SCHEDULE, 5))  # is at sigma_min already


@pytest.mark.parametrize(
    ("function", "table"),
    [(align_your_steps, "StableDiffusion"), (align_your_steps_sdxl, "StableDiffusionXL")],
    ids=["sd", "sdxl"],
)
def test_align_your_steps_in_ten_is_the_published_table(function, table):
    sigmas = function(SCHEDULE, 10)
    assert SCHEDULE.timestep(sigmas[:-1]).tolist() == AysSchedules[f"{table}Timesteps"]
    published = torch.tensor(AysSchedules[f"{table}Sigmas"])
    assert torch.allclose(sigmas, published, rtol=2e-2) and torch.allclose(sigmas, published, rtol=1e-3, atol=2e-3)


def test_align_your_steps_is_log_linear_in_between():
    ten, twenty, five = (align_your_steps(SCHEDULE, steps).double() for steps in (10, 20, 5))
    assert torch.allclose(twenty[:-1:2], ten[:-1], rtol=1e-6)
    assert torch.allclose(twenty[1:-2:2], (ten[:-2] * ten[1:-1]).sqrt(), rtol=1e-6)
    assert torch.allclose(five[:-1], ten[:-1:2], rtol=1e-6)
    assert float(twenty[-2]) == pytest.approx(float(ten[-2] * SCHEDULE.sigma_min) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 60, 80])
def test_beta_timesteps_are_scipy_s_quantiles_rounded(steps):
    shares = [1 - i / steps for i in range(steps)]
    wanted = [float(round(q * 999)) for q in scipy.stats.beta.ppf(shares, 0.6, 0.6)]
    assert SCHEDULE.timestep(beta_timesteps(SCHEDULE, steps)[:-1]).tolist() == wanted


def test_beta_timesteps_are_not_rounded_where_two_would_fall_together():
    timesteps = SCHEDULE.timestep(beta_timesteps(SCHEDULE, 400)[:-1]).double()
    wanted = torch.tensor(scipy.stats.beta.ppf([1 - i / 400 for i in range(400)], 0.6, 0.6)) * 999
    assert torch.allclose(timesteps, wanted, atol=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_beta_is_scipy_s_quantiles_over_sigma(steps):
    shares = 1 - torch.linspace(0, 1, steps, dtype=torch.float64)
    wanted = torch.tensor(scipy.stats.beta.ppf(shares, 0.6, 0.6)) * (SCHEDULE.sigma_max - SCHEDULE.sigma_min)
    assert torch.allclose(beta(SCHEDULE, steps)[:-1].double(), wanted + SCHEDULE.sigma_min, rtol=1e-6)


@pytest.mark.parametrize("steps", [3, 12])
def test_kl_optimal_is_even_in_the_arc_tangent(steps):
    angles = kl_optimal(SCHEDULE, steps)[:-1].double().atan()
    assert torch.allclose(angles.diff(), angles.diff()[0], rtol=1e-4)
    assert float(angles[-1].tan()) == pytest.approx(SCHEDULE.sigma_min, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 37, 1000])
def test_simple_counts_down_and_leaves_the_fraction_off(steps):
    wanted = [999 - int(i * 1000 / steps) for i in range(steps)]
    assert SCHEDULE.timestep(simple(SCHEDULE, steps)[:-1]).tolist() == wanted

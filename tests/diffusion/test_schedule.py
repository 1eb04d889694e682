"""Noise schedules against diffusers and closed forms; sigma and timestep as each other's inverse."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm.diffusion.schedule import (
    NOISE_SCHEDULES,
    SIGMA_TERMINAL,
    NoiseSchedule,
    cosine,
    latent_diffusion,
    linear,
    scaled_linear,
    sigmoid,
    upscaler,
    zero_terminal_snr,
)


def diffusers_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


EVERY = [pytest.param(build(), id=name) for name, build in NOISE_SCHEDULES.items()]


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (latent_diffusion(), {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        (upscaler(), {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (sigmoid(), {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
    ],
    ids=NOISE_SCHEDULES,
)
def test_schedules_equal_diffusers(schedule, config):
    theirs = diffusers_scheduler("DDPMScheduler", **config)
    assert len(schedule) == len(theirs.alphas_cumprod)
    # Theirs are float32: a cosine's last betas, 1 - a quotient of tiny numbers, keep few digits.
    assert torch.allclose(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)


def test_stable_diffusion_has_its_known_ends():
    schedule = scaled_linear()
    assert schedule.sigma_min == pytest.approx(0.0292, abs=5e-5)
    assert schedule.sigma_max == pytest.approx(14.6146, abs=5e-5)


def test_cosine_is_the_cosine_where_no_beta_is_capped():
    time = (torch.arange(1, 991, dtype=torch.float64) / 1000 + 0.008) / 1.008
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(cosine().alphas_cumprod[:990], (time * math.pi / 2).cos() ** 2 / start, rtol=1e-10)


@pytest.mark.parametrize("schedule", EVERY)
def test_alpha_and_sigma_are_those_of_a_variance_preserving_process(schedule):
    timestep = torch.tensor([0, 1, 500, 998, 999])
    alpha, s = schedule.alpha_sigma(timestep)
    assert torch.allclose(alpha**2 + s**2, torch.ones(5, dtype=torch.float64))
    assert torch.allclose(s / alpha, schedule.sigmas[timestep])
    assert torch.allclose(schedule.snr(timestep), (alpha / s) ** 2)
    assert torch.allclose(schedule.snr(timestep), schedule.sigmas[timestep] ** -2)


@pytest.mark.parametrize("schedule", [*EVERY, pytest.param(zero_terminal_snr(scaled_linear()), id="zero-terminal-snr")])
def test_timesteps_come_back_whole_from_float32_sigmas(schedule):
    timesteps = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigma(timesteps).float()), timesteps.float())


@pytest.mark.parametrize("schedule", EVERY)
def test_between_timesteps_log_sigma_is_linear(schedule):
    timesteps = torch.tensor([[0.25, 400.5], [733.125, 998.75]])
    sigma = schedule.sigma(timesteps)
    assert sigma.shape == timesteps.shape
    middle = (schedule.sigmas[400] * schedule.sigmas[401]).sqrt()
    assert float(sigma[0, 1]) == pytest.approx(float(middle), rel=1e-12)
    assert torch.allclose(schedule.timestep(sigma), timesteps, rtol=0, atol=1e-4)
    assert torch.equal(schedule.timestep(sigma, nearest=True)[1], torch.tensor([733.0, 999.0]))


def test_nearest_timestep_is_the_nearest_log_sigma():
    schedule = scaled_linear()
    sigmas = torch.logspace(-1.5, 1.1, 333)
    nearest = (sigmas.double().log()[:, None] - schedule.sigmas.log()).abs().argmin(dim=1)
    assert torch.equal(schedule.timestep(sigmas, nearest=True).long(), nearest)


def test_timesteps_beyond_the_ends_are_the_ends():
    schedule = scaled_linear()
    assert schedule.timestep(torch.tensor([0.0, 1e-3, 20.0, 1e6])).tolist() == [0, 0, 999, 999]
    assert schedule.sigma(torch.tensor([-1.0, 1000.0])).tolist() == pytest.approx(
        [schedule.sigma_min, schedule.sigma_max]
    )


def test_timestep_of_diffusers_karras_sigmas():
    """diffusers' Euler interpolates in log sigma as well."""
    theirs = diffusers_scheduler(
        "EulerDiscreteScheduler",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=True,
    )
    theirs.set_timesteps(13)
    ours = NoiseSchedule(theirs.alphas_cumprod.double()).timestep(theirs.sigmas[:-1])
    assert torch.allclose(ours, theirs.timesteps, rtol=0, atol=1e-2)


def test_zero_terminal_snr_equals_diffusers_but_for_the_last():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    ours = zero_terminal_snr(scaled_linear())
    assert torch.allclose(ours.alphas_cumprod[:-1], theirs[:-1], rtol=1e-9)
    assert float(theirs[-1]) == 0
    assert ours.sigma_max == pytest.approx(SIGMA_TERMINAL)
    assert ours.sigma_min == pytest.approx(scaled_linear().sigma_min)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0.9, 0.5]),  # float32
        torch.tensor([0.5, 0.9], dtype=torch.float64),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.tensor([0.5, 0.0], dtype=torch.float64),
        torch.tensor([[0.9], [0.5]], dtype=torch.float64),
        torch.tensor([0.9, float("nan")], dtype=torch.float64),
    ],
)
def test_what_is_no_schedule_is_refused(values):
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        NoiseSchedule(values)

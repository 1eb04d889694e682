"""Sigma schedules against diffusers and closed forms, and what all of them promise."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ldm.diffusion.schedule import NoiseSchedule, scaled_linear, zero_terminal_snr
from ldm.diffusion.sigmas import (
    SCHEDULES,
    end_above_zero,
    exponential,
    karras,
    latent_consistency,
    leading,
    linspace,
    sgm_uniform,
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


@pytest.mark.parametrize("name", ["karras", "exponential", "sgm-uniform", "linspace", "trailing", "lcm"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_all_but_leading_start_at_the_top(name, steps):
    assert float(SCHEDULES[name](SCHEDULE, steps)[0]) == pytest.approx(SCHEDULE.sigma_max)


@pytest.mark.parametrize("steps", [2, 5, 20, 31])
@pytest.mark.parametrize(
    ("function", "config"),
    [
        (karras, {"use_karras_sigmas": True}),
        (exponential, {"use_exponential_sigmas": True}),
        (leading, {"timestep_spacing": "leading", "steps_offset": 1}),
        (trailing, {"timestep_spacing": "trailing"}),
    ],
    ids=["karras", "exponential", "leading", "trailing"],
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

"""Prediction types and the two scales of the state, against their definitions and diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ldm.diffusion.prediction import from_denoised, to_denoised, training_target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.state import finish_state, noised, start_state, vp_noised, vp_scale


def diffusers_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


THEIRS = diffusers_scheduler("DDPMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULE = NoiseSchedule(THEIRS.alphas_cumprod.double())
TIMESTEPS = torch.tensor([0, 10, 500, 999])
SIGMA = SCHEDULE.sigma(TIMESTEPS)
GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE, OUTPUT = torch.randn(3, 4, 2, 5, 5, generator=GENERATOR)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_perfect_network_gives_back_the_clean_sample(prediction):
    x = noised(X0, NOISE, SIGMA)
    denoised = to_denoised(prediction, training_target(prediction, X0, NOISE, SIGMA), x, SIGMA)
    assert torch.allclose(denoised, X0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_from_denoised_is_the_inverse(prediction):
    x = noised(X0, NOISE, SIGMA)
    back = from_denoised(prediction, to_denoised(prediction, OUTPUT, x, SIGMA), x, SIGMA)
    assert torch.allclose(back, OUTPUT, atol=1e-4)


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_denoised_equals_diffusers(prediction, theirs):
    scheduler = diffusers_scheduler(
        "DDPMScheduler",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=theirs,
        clip_sample=False,
    )
    x = noised(X0, NOISE, SIGMA)
    ours = to_denoised(prediction, OUTPUT, x, SIGMA)
    for i, timestep in enumerate(TIMESTEPS):
        preserving = x[i] * vp_scale(SIGMA)[i].float()
        reference = scheduler.step(OUTPUT[i], timestep, preserving).pred_original_sample
        assert torch.allclose(ours[i], reference, rtol=1e-4, atol=1e-4)


def test_training_state_and_velocity_equal_diffusers():
    assert torch.allclose(vp_noised(X0, NOISE, SIGMA), THEIRS.add_noise(X0, NOISE, TIMESTEPS), atol=1e-5)
    velocity = training_target("v", X0, NOISE, SIGMA)
    assert torch.allclose(velocity, THEIRS.get_velocity(X0, NOISE, TIMESTEPS), atol=1e-5)


def test_the_two_scales_are_one_state():
    exploding = noised(X0, NOISE, SIGMA)
    scaled = exploding * vp_scale(SIGMA).float().reshape(-1, 1, 1, 1)
    assert torch.allclose(scaled, vp_noised(X0, NOISE, SIGMA), atol=1e-5)
    assert torch.equal(noised(X0, NOISE, 2.0), noised(X0, NOISE, torch.full((4,), 2.0)))


def test_start_and_finish_undo_the_scale():
    """A VP model is started from unit noise and ends in a VP state."""
    sigma = 14.6
    network_sees = start_state(NOISE, sigma) * vp_scale(torch.tensor([sigma])).float()
    assert torch.allclose(network_sees, NOISE, atol=1e-6)
    assert torch.equal(finish_state(X0, 0.0), X0)
    alpha = float(vp_scale(torch.tensor(0.0292, dtype=torch.float64)))
    assert torch.allclose(finish_state(X0, 0.0292), alpha * X0)

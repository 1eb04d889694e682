"""Every sampler equals diffusers' scheduler of that name after every step, on the same sigmas, timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, always, guided
from ldm.diffusion.schedule import NoiseSchedule, scaled_linear
from ldm.diffusion.sigmas import end_above_zero, latent_consistency, leading, trailing
from ldm.diffusion.state import finish_state, start_state
from ldm.samplers import Sample
from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm
from ldm.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.heun import heun
from ldm.samplers.lcm import lcm
from ldm.samplers.multistep import deis
from ldm.samplers.plms import plms
from ldm.samplers.tcd import tcd
from ldm.samplers.unipc import unipc
from ldm.types import Conditioning, Denoise, NoiseSource, PredictionType

STEPS = 12
SHAPE = (2, 3, 4, 4)
SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = SD | {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = SD | {"timestep_spacing": "trailing"}
FINAL_ALPHA = {"set_alpha_to_one": False}
TOLERANCE = 1e-4


def diffusers_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


def network(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """Smooth and bounded, mixes neighbours and depends on the timestep to a thousandth of a step."""
    phase = timestep.float().reshape(-1, 1, 1, 1)
    return 0.6 * torch.tanh(x + 0.5 * x.roll(1, dims=-1)) + 0.3 * torch.sin(x * 2 + phase / 7) + 0.1 * torch.cos(phase)


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule(scheduler.alphas_cumprod.double())


def denoise_with(schedule: NoiseSchedule, prediction: PredictionType = "eps", *, nearest: bool = False) -> Denoise:
    return guided(Denoiser(network, schedule, prediction, nearest_timestep=nearest), always(Conditioning()), Guidance())


def drawn(seed: int) -> NoiseSource:
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator)


def exploding_states(scheduler: Any, noise: Tensor, sigmas: Tensor, **step: Any) -> list[Tensor]:
    """The states of a diffusers scheduler that works in the VE scale, after every whole step."""
    x, states = start_state(noise, float(sigmas[0])), []
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep.expand(len(x)), Conditioning())
        x = scheduler.step(output, timestep, x, **step).prev_sample
        between = not getattr(scheduler, "state_in_first_order", True)  # in the middle of a step of two stages
        if not between or timestep == scheduler.timesteps[-1]:
            states.append(x)
    return states


def preserving_states(scheduler: Any, noise: Tensor, sigmas: Tensor, **step: Any) -> list[Tensor]:
    """The states of a diffusers scheduler that works in the VP scale, after every step, in the VE scale."""
    x, states = noise, []
    for timestep in scheduler.timesteps:
        output = network(x, timestep.expand(len(x)), Conditioning())
        x = scheduler.step(output, timestep, x, **step).prev_sample
        states.append(x)
    states = states[-(len(sigmas) - 1) :]  # PNDM calls its first step twice
    return [x * (1 + sigma**2).sqrt() for x, sigma in zip(states, sigmas[1:], strict=True)]


def assert_same(
    sampler: Sample, denoise: Denoise, noise: Tensor, sigmas: Tensor, theirs: list[Tensor], source: NoiseSource
) -> None:
    ours = list(sampler(denoise, start_state(noise, float(sigmas[0])), sigmas, source))
    assert len(ours) == len(theirs) == len(sigmas) - 1
    for step, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(step.x, reference, rtol=TOLERANCE, atol=TOLERANCE), f"step {step.index}"


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Case:
    """A scheduler that keeps its sigmas, which are then fed to our sampler.

    exploding: its states are VE; draws: it takes a generator; nearest: it rounds the timesteps of its sigmas.
    """

    scheduler: str
    config: dict[str, Any]
    sampler: Sample
    exploding: bool = False
    draws: bool = False
    nearest: bool = False


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Theirs is not a number for bh1 at sigma 0.
ABOVE_ZERO = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
EULER, HEUN = "EulerDiscreteScheduler", "HeunDiscreteScheduler"
DEIS = "DEISMultistepScheduler"
ANCESTRAL = "EulerAncestralDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

CASES = {
    "euler": Case(EULER, LEADING, euler, exploding=True),
    "euler, karras": Case(EULER, LEADING | KARRAS, euler, exploding=True),
    "euler-a": Case(ANCESTRAL, LEADING, euler_ancestral, exploding=True, draws=True),
    "heun": Case(HEUN, LEADING, heun, exploding=True),
    "heun, karras": Case(HEUN, LEADING | KARRAS, heun, exploding=True),
    "dpmpp-2m": Case(DPM, LEADING, dpmpp_2m),
    "dpmpp-2m, karras": Case(DPM, SD | KARRAS, dpmpp_2m, nearest=True),
    "dpmpp-2m-sde": Case(DPM, TRAILING | SDE, dpmpp_2m_sde, draws=True),
    "deis": Case(DEIS, LEADING | {"solver_order": 3, "lower_order_final": False}, deis),
    "deis, order 2": Case(DEIS, TRAILING | {"lower_order_final": False}, partial(deis, order=2)),
    "unipc": Case(UNIPC, LEADING, unipc),
    "unipc, karras": Case(UNIPC, SD | KARRAS, unipc, nearest=True),
    "unipc, order 3": Case(UNIPC, TRAILING | {"solver_order": 3}, partial(unipc, order=3)),
    "unipc, bh1": Case(UNIPC, TRAILING | ABOVE_ZERO | {"solver_type": "bh1"}, partial(unipc, scaling="bh1")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("steps", [2, STEPS, 20])
def test_samplers_over_sigmas(case, steps, noise):
    scheduler = diffusers_scheduler(case.scheduler, **case.config)
    scheduler.set_timesteps(steps)
    sigmas = torch.unique_consecutive(scheduler.sigmas)  # Heun holds the inner ones twice
    states = exploding_states if case.exploding else preserving_states
    extra = {"generator": torch.Generator().manual_seed(3)} if case.draws else {}
    theirs = states(scheduler, noise, sigmas, **extra)
    denoise = denoise_with(schedule_of(scheduler), nearest=case.nearest)
    assert_same(case.sampler, denoise, noise, sigmas, theirs, drawn(3))


def test_ddim(noise):
    scheduler = diffusers_scheduler("DDIMScheduler", **LEADING, **FINAL_ALPHA, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    schedule = schedule_of(scheduler)
    sigmas = end_above_zero(leading(schedule, STEPS), schedule)
    theirs = preserving_states(scheduler, noise, sigmas)
    assert_same(ddim, denoise_with(schedule), noise, sigmas, theirs, drawn(3))
    *_, last = ddim(denoise_with(schedule), start_state(noise, float(sigmas[0])), sigmas, drawn(3))
    latent = theirs[-1] / (1 + sigmas[-1] ** 2).sqrt()
    assert torch.allclose(finish_state(last.x, last.sigma_next), latent, atol=TOLERANCE)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta, noise):
    scheduler = diffusers_scheduler("DDIMScheduler", **TRAILING, clip_sample=False)  # ends at 0
    scheduler.set_timesteps(20)  # theirs step by T // n, which is their own trailing spacing only if n divides T
    schedule = schedule_of(scheduler)
    sigmas = trailing(schedule, 20)
    theirs = preserving_states(scheduler, noise, sigmas, eta=eta, generator=torch.Generator().manual_seed(3))
    assert_same(partial(ddim, eta=eta), denoise_with(schedule), noise, sigmas, theirs, drawn(3))


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_ddim_of_other_predictions(prediction, noise):
    theirs_name = {"v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = diffusers_scheduler("DDIMScheduler", **TRAILING, clip_sample=False, prediction_type=theirs_name)
    scheduler.set_timesteps(20)
    schedule = schedule_of(scheduler)
    sigmas = trailing(schedule, 20)
    theirs = preserving_states(scheduler, noise, sigmas)
    assert_same(ddim, denoise_with(schedule, prediction), noise, sigmas, theirs, drawn(3))


def test_plms(noise):
    scheduler = diffusers_scheduler("PNDMScheduler", **LEADING, **FINAL_ALPHA, skip_prk_steps=True)
    scheduler.set_timesteps(STEPS)
    schedule = schedule_of(scheduler)
    sigmas = end_above_zero(leading(schedule, STEPS), schedule)
    theirs = preserving_states(scheduler, noise, sigmas)
    assert_same(plms, denoise_with(schedule), noise, sigmas, theirs, drawn(3))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, noise):
    config = LEADING | {"steps_offset": 0, "variance_type": f"fixed_{variance}", "clip_sample": False}
    scheduler = diffusers_scheduler("DDPMScheduler", **config)
    scheduler.set_timesteps(STEPS)
    schedule = schedule_of(scheduler)
    sigmas = leading(schedule, STEPS, offset=0)  # theirs leaves the noise out at timestep 0 only
    theirs = preserving_states(scheduler, noise, sigmas, generator=torch.Generator().manual_seed(3))
    assert_same(partial(ddpm, variance=variance), denoise_with(schedule), noise, sigmas, theirs, drawn(3))


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(steps, noise):
    scheduler = diffusers_scheduler("LCMScheduler", **SD, clip_sample=False)
    scheduler.set_timesteps(steps)
    schedule = schedule_of(scheduler)
    sigmas = latent_consistency(schedule, steps)
    theirs = preserving_states(scheduler, noise, sigmas, generator=torch.Generator().manual_seed(3))
    assert_same(lcm, consistency(denoise_with(schedule), schedule), noise, sigmas, theirs, drawn(3))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd(steps, eta, noise):
    scheduler = diffusers_scheduler("TCDScheduler", **SD, clip_sample=False)
    scheduler.set_timesteps(steps)
    schedule = schedule_of(scheduler)
    sigmas = end_above_zero(latent_consistency(schedule, steps), schedule)
    theirs = preserving_states(scheduler, noise, sigmas, eta=eta, generator=torch.Generator().manual_seed(3))
    assert_same(partial(tcd, eta=eta), denoise_with(schedule), noise, sigmas, theirs, drawn(3))


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_sde_on_one_brownian_path(karras, noise):
    """Both sides read increments of the same path W(sigma), theirs over overlapping intervals, ours over halves."""
    scheduler = diffusers_scheduler("DPMSolverSDEScheduler", **LEADING, use_karras_sigmas=karras)
    scheduler.set_timesteps(STEPS)
    sigmas = torch.unique_consecutive(scheduler.sigmas)
    path = brownian_path(sigmas)

    def increment(sigma: float, sigma_next: float) -> Tensor:
        return (path(sigma_next) - path(sigma)) / abs(float(sigma) - float(sigma_next)) ** 0.5

    scheduler.noise_sampler = increment
    theirs = exploding_states(scheduler, noise, sigmas)
    assert_same(dpmpp_sde, denoise_with(schedule_of(scheduler)), noise, sigmas, theirs, increment)


def brownian_path(sigmas: Tensor) -> Callable[[float], Tensor]:
    """W at every sigma and, geometrically, half way between: the nearest of those is meant."""
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    levels = torch.cat([sigmas, middles]).double().sort().values
    steps = torch.randn(len(levels), *SHAPE, generator=torch.Generator().manual_seed(3))
    widths = torch.cat([levels[:1], levels.diff()]).sqrt().float()
    walk = (steps * widths.reshape(-1, 1, 1, 1, 1)).cumsum(0)
    return lambda sigma: walk[int((levels - float(sigma)).abs().argmin())]


def test_our_schedule_is_theirs():
    theirs = diffusers_scheduler("DDIMScheduler", **SD).alphas_cumprod.double()
    assert torch.allclose(scaled_linear().alphas_cumprod, theirs, rtol=1e-4, atol=0)  # theirs are float32 products

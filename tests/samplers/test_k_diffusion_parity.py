"""The samplers that come from k-diffusion equal it after every step, on the same sigmas, denoiser and noise."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.sigmas import SCHEDULES, exponential, karras, linspace, polyexponential
from ldm.samplers import Sample
from ldm.samplers.dpm2 import dpm2, dpm2_ancestral
from ldm.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.heun import heun
from ldm.samplers.multistep import lms
from ldm.types import NoiseSource

SHAPE = (2, 3, 4, 4)
SCHEDULE = scaled_linear()


@pytest.fixture(scope="module")
def sampling() -> Any:
    """k_diffusion.sampling, without the package's own front, which imports far more than it needs."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None and spec.submodule_search_locations is not None
    front = types.ModuleType("k_diffusion")
    front.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", front)
        yield importlib.import_module("k_diffusion.sampling")


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth, bounded, mixes neighbours, and depends on sigma."""
    level = sigma.reshape(-1, 1, 1, 1).to(x)
    return 0.8 * torch.tanh((x + 0.5 * x.roll(1, dims=-1)) / (1 + level**2).sqrt()) + 0.2 * torch.cos(level.log() * 3)


def drawn(seed: int) -> NoiseSource:
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Our sampler, their function's name and the options that both take. draws: whether it takes a noise source."""

    sampler: Sample
    theirs: str
    options: dict[str, float]
    draws: bool = False


ETAS = ({}, {"eta": 0.5})
CASES = [
    Case(euler, "sample_euler", {}),
    Case(heun, "sample_heun", {}),
    Case(dpm2, "sample_dpm_2", {}),
    Case(lms, "sample_lms", {}),
    Case(lms, "sample_lms", {"order": 2}),
    Case(dpmpp_2m, "sample_dpmpp_2m", {}),
    *(Case(euler_ancestral, "sample_euler_ancestral", eta, draws=True) for eta in ETAS),
    *(Case(dpm2_ancestral, "sample_dpm_2_ancestral", eta, draws=True) for eta in ETAS),
    *(Case(dpmpp_2s_ancestral, "sample_dpmpp_2s_ancestral", eta, draws=True) for eta in ETAS),
    *(Case(dpmpp_2m_sde, "sample_dpmpp_2m_sde", eta, draws=True) for eta in ETAS),
    *(Case(dpmpp_3m_sde, "sample_dpmpp_3m_sde", eta, draws=True) for eta in (*ETAS, {"eta": 0.0})),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.theirs}-{case.options}")
@pytest.mark.parametrize(("levels", "steps"), [(karras, 2), (karras, 15), (exponential, 8), (linspace, 20)])
def test_every_step_equals_k_diffusion(case, levels, steps, sampling):
    """In double precision; sigmas are float32, as ours always are."""
    sigmas = levels(SCHEDULE, steps)
    x = float(sigmas[0]) * torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ours = list(partial(case.sampler, **case.options)(denoise, x, sigmas, drawn(3)))
    seen: list[Tensor] = []
    extra = {"noise_sampler": drawn(3)} if case.draws else {}
    last = getattr(sampling, case.theirs)(
        denoise, x, sigmas.double(), callback=lambda at: seen.append(at["x"]), disable=True, **extra, **case.options
    )
    theirs = [*seen[1:], last]  # each call shows the state before its step
    assert len(ours) == len(theirs) == steps
    for step, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(step.x, reference, rtol=1e-6, atol=1e-6), f"step {step.index}"


@pytest.mark.parametrize("steps", [1, 2, 11, 40])
@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
def test_polyexponential(steps, rho, sampling):
    theirs = sampling.get_sigmas_polyexponential(steps, SCHEDULE.sigma_min, SCHEDULE.sigma_max, rho=rho)
    assert torch.allclose(polyexponential(SCHEDULE, steps, rho=rho), theirs, rtol=1e-5)


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential"])
def test_its_schedules_by_name(name, sampling):
    theirs = getattr(sampling, f"get_sigmas_{name}")(12, SCHEDULE.sigma_min, SCHEDULE.sigma_max)
    assert torch.allclose(SCHEDULES[name](SCHEDULE, 12), theirs, rtol=1e-5)

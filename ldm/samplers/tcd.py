"""Sampling of a trajectory consistency model. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.schedule import scaled_linear
from ldm.samplers.common import denoise_at, intervals, shrink
from ldm.types import Denoise, NoiseSource, Step

_TIMESTEPS = scaled_linear()
"""Stable Diffusion's, on which every TCD model was distilled: eta is a share of its timesteps."""


def tcd(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 0.3) -> Iterator[Step]:
    """Jump below the next level, to the share 1 - eta of its timestep, and add noise back up to it (Zheng et al. 2024).

    This is the paper's strategic stochastic sampling (algorithm 4; eta is its gamma): 0 is deterministic, and Euler's
    method; 1 jumps all the way down as `lcm` does. The noise does not vanish with the length of the steps, so there is
    no limit to converge to. As published it ends at timestep 0 and not at sigma 0.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        below = _level_below(sigma_next, eta)
        x = shrink(x, denoised, below / sigma)
        if below < sigma_next:
            x = x + math.sqrt(sigma_next**2 - below**2) * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)


def _level_below(sigma: float, eta: float) -> float:
    """The sigma of the whole timestep at the share 1 - eta of that of `sigma`; never above `sigma`."""
    if sigma == 0:
        return sigma
    timestep = _TIMESTEPS.timestep(torch.tensor(sigma, dtype=torch.float64)).double()
    below = ((1 - eta) * timestep).floor()
    return min(sigma, float(_TIMESTEPS.sigma(below))) if below < timestep and eta > 0 else sigma

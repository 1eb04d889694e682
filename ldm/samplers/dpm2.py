"""DPM-Solver-2, plain and ancestral. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import ancestral_split, denoise_at, intervals, second_slope_helps, shrink
from ldm.types import Denoise, NoiseSource, Step


def dpm2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Step with the slope at the middle (Lu et al. 2022, DPM-Solver, algorithm 1, in k-diffusion's form). Order 2.

    It is `dpm2_ancestral` without the noise.
    """
    yield from dpm2_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpm2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """A midpoint step a little too far down, and fresh noise (k-diffusion's DPM2 a): two evaluations a step.

    The middle is so in log sigma. A step to 0, or from a sigma that stands for infinity, is Euler's. Weak order 1,
    since the noise is added after the step and not on the way.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        if second_slope_helps(sigma, down):
            middle = math.sqrt(sigma * down)
            trial = shrink(x, denoised, middle / sigma)
            x = x + (down - sigma) / middle * (trial - denoise_at(denoise, trial, middle))
        else:
            x = shrink(x, denoised, down / sigma)
        if up > 0:
            x = x + up * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)

"""The DPM-Solver++ family (Lu et al. 2022). See `ldm.samplers.common` for the arguments.

In the time lambda = -log sigma the probability-flow ODE is dx / dlambda = denoised - x, linear but for `denoised`. With
`denoised` held still over a step of length h = log(sigma / sigma_next) its solution is exact:
x_next = denoised + e^-h * (x - denoised). These solvers take that step towards a better guess of `denoised`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import ancestral_split, denoise_at, intervals, shrink
from ldm.types import Denoise, NoiseSource, Step


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Two-step multistep, deterministic (Lu et al. 2022, algorithm 2). Order 2.

    It is `dpmpp_2m_sde` without the noise; the first step, and one to 0, are Euler's.
    """
    yield from dpmpp_2m_sde(denoise, x, sigmas, noise, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """Two-step multistep for the diffusion SDE, in its midpoint form (Lu et al. 2022, section 5; k-diffusion).

    `denoised` in the middle of a step is extrapolated from the last two. eta is how much of the SDE's noise is in.
    Weak order 2.
    """
    previous: tuple[float, Tensor] | None = None  # length and estimate of the step before
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        target, h = denoised, math.inf
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            if previous is not None:
                target = denoised + h / (2 * previous[0]) * (denoised - previous[1])
        ratio = sigma_next / sigma
        x = shrink(x, target, ratio ** (1 + eta))
        if eta > 0 and sigma_next > 0:
            x = x + sigma_next * math.sqrt(1 - ratio ** (2 * eta)) * noise(sigma, sigma_next)
        previous = (h, denoised)
        yield Step(index, sigma, sigma_next, x, denoised)


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0) -> Iterator[Step]:
    """Single-step midpoint method for the diffusion SDE (k-diffusion's DPM++ SDE): two evaluations a step.

    A trial step to the middle, sqrt(sigma * sigma_next), gives the estimate with which the whole step is made. A step
    to 0 is Euler's. Both steps walk the same Brownian path over sigma: the noise of the whole is the noise of its two
    halves, without which the variance would converge with order 1 only. Weak order 2. With eta 0 it is the
    deterministic DPM-Solver++(2S).
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        if sigma_next == 0:
            x = denoised
            yield Step(index, sigma, sigma_next, x, denoised)
            continue
        middle = math.sqrt(sigma * sigma_next)
        down, up = ancestral_split(sigma, middle, eta)
        trial = shrink(x, denoised, down / sigma)
        first = noise(sigma, middle) if eta > 0 else None
        if first is not None:
            trial = trial + up * first
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = shrink(x, denoise_at(denoise, trial, middle), down / sigma)
        if first is not None:
            share = (sigma - middle) / (sigma - sigma_next)
            x = x + up * (math.sqrt(share) * first + math.sqrt(1 - share) * noise(middle, sigma_next))
        yield Step(index, sigma, sigma_next, x, denoised)

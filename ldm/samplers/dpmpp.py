"""The DPM-Solver++ family (Lu et al. 2022). See `ldm.samplers.common` for the arguments.

In the time lambda = -log sigma the probability-flow ODE is dx / dlambda = denoised - x, linear but for `denoised`. With
`denoised` held still over a step of length h = log(sigma / sigma_next) its solution is exact:
x_next = denoised + e^-h * (x - denoised). These solvers take that step towards a better guess of `denoised`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ldm.samplers.common import ancestral_split, denoise_at, intervals, shrink, weights_for
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


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(2S), a little too far down, and fresh noise (Lu et al. 2022, algorithm 1; k-diffusion's 2S a).

    A trial step to the middle gives the estimate with which the whole step is made: two evaluations. A step to 0 is
    Euler's. Weak order 1, since the noise is added after the step and not on the way; order 2 with eta 0.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        target = denoised = denoise_at(denoise, x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            target = denoise_at(denoise, shrink(x, denoised, middle / sigma), middle)
        x = shrink(x, target, down / sigma)
        if up > 0:
            x = x + up * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """Three-step multistep for the diffusion SDE (k-diffusion's DPM++ 3M SDE), one evaluation a step.

    `denoised` over the step is extrapolated from the last three estimates: at first a constant, then a line, then a
    parabola in lambda, integrated exactly. A step to 0 is Euler's. Weak order 2.
    """
    known: list[tuple[float, Tensor]] = []  # (sigma, estimate), newest first
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        known = [(sigma, denoised), *known[:2]]
        ratio = sigma_next / sigma
        x = shrink(x, denoised, ratio ** (1 + eta))
        if sigma_next > 0:
            for weight, (_, estimate) in zip(_weights_ahead(known, sigma_next, eta), known[1:], strict=True):
                x = x + weight * (estimate - denoised)
            if eta > 0:
                x = x + sigma_next * math.sqrt(1 - ratio ** (2 * eta)) * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)


def _weights_ahead(known: Sequence[tuple[float, Tensor]], sigma_next: float, eta: float) -> list[float]:
    """The weights of the older estimates' differences from the newest, for a step of the diffusion SDE.

    With u = 0 at the newest level, 1 at sigma_next, and y = (1 + eta) * h the step's length to the SDE, the exact step
    adds the integral of y * e^(y (u - 1)) * denoised(u); by parts, that of u^m is 1 - m / y * (that of m - 1).
    All programs follow the first code of DPM-Solver++, which halves the parabola's bend, and so do we.
    """
    h = math.log(known[0][0] / sigma_next)
    y = (1 + eta) * h
    nodes = [math.log(known[0][0] / level) / h for level, _ in known]
    moments = [-math.expm1(-y)]
    for m in range(1, len(nodes)):
        moments.append(1 - m / y * moments[-1])
    return weights_for(nodes, [*moments[:2], *(moment / 2 for moment in moments[2:])])[1:]

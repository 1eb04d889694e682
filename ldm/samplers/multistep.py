"""LMS and DEIS: Adams-Bashforth methods for steps of any length. See `ldm.samplers.common` for the arguments.

dx / dsigma is the slope, so x_next = x + the integral of the slope from sigma to sigma_next. Both lay a polynomial
through the last few slopes and integrate it exactly. LMS has a polynomial in sigma, DEIS one in log sigma, in which the
slopes of a diffusion change more evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, shrink, weights_for
from ldm.types import Denoise, NoiseSource, Step

Weights = Callable[[Sequence[float], float], list[float]]
"""(the sigmas of the known slopes, newest first; sigma_next) -> how much of each slope x_next - x is."""


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep in sigma (k-diffusion's LMS), from one slope to `order` of them, one evaluation a step.

    Its first step is Euler's, whose error of order 2 stays: that is the order it has from beginning to end.
    """
    yield from _multistep(denoise, x, sigmas, order, _weights_in_sigma)


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, order: int = 3) -> Iterator[Step]:
    """DEIS in log sigma (Zhang and Chen 2022, eq. 14-15, their "log rho", which is diffusers' convention).

    As for `lms`, the first step is Euler's; so is one to 0, where log sigma ends.
    """
    yield from _multistep(denoise, x, sigmas, order, _weights_in_log_sigma)


def _multistep(denoise: Denoise, x: Tensor, sigmas: Tensor, order: int, weights: Weights) -> Iterator[Step]:
    levels: list[float] = []
    slopes: list[Tensor] = []  # both newest first
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        levels, slopes = [sigma, *levels[: order - 1]], [(x - denoised) / sigma, *slopes[: order - 1]]
        x = shrink(x, denoised, sigma_next / sigma)
        # The weights add up to sigma_next - sigma, which Euler's step has spent on the newest slope.
        for weight, slope in zip(weights(levels, sigma_next)[1:], slopes[1:], strict=True):
            x = x + weight * (slope - slopes[0])
        yield Step(index, sigma, sigma_next, x, denoised)


def _weights_in_sigma(levels: Sequence[float], sigma_next: float) -> list[float]:
    """With u = 0 at the newest level and 1 at sigma_next, the integral of u^m is 1 / (m + 1)."""
    step = sigma_next - levels[0]
    nodes = [(level - levels[0]) / step for level in levels]
    return weights_for(nodes, [step / (m + 1) for m in range(len(nodes))])


def _weights_in_log_sigma(levels: Sequence[float], sigma_next: float) -> list[float]:
    """With u so in log sigma and h = log(sigma / sigma_next), dsigma is -h * sigma * e^(-h u) du.

    By parts, the integral of h * u^m * e^(-h u) is m / h * (that of m - 1) - e^-h.
    """
    if sigma_next == 0:
        return [-levels[0], *(0.0 for _ in levels[1:])]
    h = math.log(levels[0] / sigma_next)
    nodes = [math.log(levels[0] / level) / h for level in levels]
    moments = [-math.expm1(-h)]
    for m in range(1, len(nodes)):
        moments.append(m / h * moments[-1] - math.exp(-h))
    return weights_for(nodes, [-levels[0] * moment for moment in moments])

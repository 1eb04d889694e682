"""PLMS, the pseudo linear multistep method. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, second_slope_helps, shrink
from ldm.types import Denoise, NoiseSource, Step

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the slopes, newest first, by how many there are: they extrapolate over steps of equal length."""


def plms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Step with a slope extrapolated from the last four (Liu et al. 2022, eq. 9 and 12), as Stable Diffusion has it.

    The first step, with nothing to look back on, looks ahead: it takes the mean of the slopes at its two ends, which
    costs the one evaluation more than there are steps. The weights suppose equal steps, which sigmas seldom have, so
    the order is 2 and not the 4 that the weights have on an even grid.
    """
    slopes: list[Tensor] = []
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[:3]]
        if index == 0 and second_slope_helps(sigma, sigma_next):
            ahead = shrink(x, denoised, sigma_next / sigma)
            slope = (slopes[0] + (ahead - denoise_at(denoise, ahead, sigma_next)) / sigma_next) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(slopes) - 1]
            slope = sum((w * s for w, s in zip(weights[1:], slopes[1:], strict=True)), weights[0] * slopes[0])
        x = x + (sigma_next - sigma) * slope
        yield Step(index, sigma, sigma_next, x, denoised)

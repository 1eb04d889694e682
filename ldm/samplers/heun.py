"""Heun's method. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, second_slope_helps, shrink
from ldm.types import Denoise, NoiseSource, Step


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Step with the mean of the slopes at both ends (Karras et al. 2022, algorithm 1): two evaluations a step, order 2.

    A step to 0, or from a sigma that stands for infinity, is Euler's.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        predicted = shrink(x, denoised, sigma_next / sigma)
        if second_slope_helps(sigma, sigma_next):
            slope = (x - denoised) / sigma
            slope_next = (predicted - denoise_at(denoise, predicted, sigma_next)) / sigma_next
            x = predicted + (sigma_next - sigma) / 2 * (slope_next - slope)
        else:
            x = predicted
        yield Step(index, sigma, sigma_next, x, denoised)

"""Euler and Euler ancestral: the plainest solvers. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import ancestral_split, denoise_at, intervals, shrink
from ldm.types import Denoise, NoiseSource, Step


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Follow the slope at each level to the next one (Karras et al. 2022, algorithm 1 without the correction).

    Order 1.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        x = shrink(x, denoised, sigma_next / sigma)
        yield Step(index, sigma, sigma_next, x, denoised)


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """Denoise a little too far and add fresh noise back (k-diffusion's Euler ancestral).

    eta 0 is `euler`, eta 1 draws from the posterior of the forward process, as DDPM does. Weak order 1.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = shrink(x, denoised, down / sigma)
        if up > 0:
            x = x + up * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)

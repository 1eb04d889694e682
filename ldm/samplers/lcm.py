"""Multistep sampling of a latent consistency model. See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals
from ldm.types import Denoise, NoiseSource, Step


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource) -> Iterator[Step]:
    """Jump to the end of the trajectory, add noise of the next level, jump again (Song et al. 2023, algorithm 1).

    `denoise` must be a consistency function, which maps any point of a trajectory to its end, and not the mean over
    all that might have been there. `ldm.diffusion.consistency` adds the boundary condition of Luo et al. 2023.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        x = denoised = denoise_at(denoise, x, sigma)
        if sigma_next > 0:
            x = denoised + sigma_next * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)

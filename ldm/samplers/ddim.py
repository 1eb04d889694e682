"""DDIM (Song et al. 2020). See `ldm.samplers.common` for the arguments."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.euler import euler_ancestral
from ldm.types import Denoise, NoiseSource, Step


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, eta: float = 0.0) -> Iterator[Step]:
    """Song et al. 2020, eq. 12 and 16: eta 0 is deterministic (order 1), eta 1 is DDPM's process.

    Divide eq. 12 by sqrt(alphas_cumprod) of the level it goes to, and it reads x_next = denoised + down * eps + up *
    noise: in the variance-exploding scale DDIM *is* the Euler step, and its eta is the ancestral one. What made it
    look different is where Stable Diffusion stops, see `ldm.diffusion.sigmas.end_above_zero`.
    """
    yield from euler_ancestral(denoise, x, sigmas, noise, eta=eta)

"""The two scales of a noisy state, and the ways between them.

Samplers hold x = x0 + sigma * noise (variance exploding, VE). Networks were trained on the same state at unit
variance, x / sqrt(1 + sigma^2) = alpha * x0 + s * noise (variance preserving, VP).

Shapes: x, x0, noise (B, ...); sigma (B,), or a float for all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) on the device and in the dtype of `like` (B, ...), to be multiplied with it."""
    # The dtype first: some devices hold no float64, in which the schedules are kept.
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def vp_scale(sigma: Tensor) -> Tensor:
    """alpha = 1 / sqrt(1 + sigma^2): what a VE state is multiplied with to get a VP one."""
    return (1 + sigma.double() ** 2).rsqrt()


def noised(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The VE state of `x0` at `sigma`: where image-to-image starts, and what training shows to the Denoiser."""
    return x0 + (spread(sigma, x0) if isinstance(sigma, Tensor) else sigma) * noise


def start_state(noise: Tensor, sigma: float) -> Tensor:
    """The VE state that stands for pure noise at the first level of a VP model: noise * sqrt(1 + sigma^2).

    The network then sees unit noise, as Stable Diffusion's samplers give it. `noise * sigma`, which VE models start
    from, would be 0.2% smaller at sigma = 14.6.
    """
    return noise * math.sqrt(1 + sigma**2)


def finish_state(x: Tensor, sigma: float) -> Tensor:
    """The latent that a state at the last level stands for: x / sqrt(1 + sigma^2), which is x itself at sigma 0.

    Stable Diffusion's DDIM and PLMS end at sigma_0 = 0.0292, not 0, and take the VP state there for the latent.
    """
    return x / math.sqrt(1 + sigma**2)


def vp_noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The VP state of `x0` at `sigma` (B,): alpha * x0 + s * noise (Ho et al. 2020, eq. 4)."""
    alpha = vp_scale(sigma)
    return spread(alpha, x0) * x0 + spread(alpha * sigma, x0) * noise


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is finer: the precision of all maths outside the networks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

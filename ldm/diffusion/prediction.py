"""What a network's output means: the noise, the velocity, or the clean sample.

All three are affine in each other given the state x = x0 + sigma * noise (VE), so every one can be turned into the
estimate of the clean sample, `denoised`, and back. With alpha = 1 / sqrt(1 + sigma^2) and s = sigma * alpha:

    eps = noise                                (Ho et al. 2020)
    v   = alpha * noise - s * x0               (Salimans and Ho 2022, section 4)
    x0  = x0

Shapes: x, output, denoised, x0, noise (B, ...); sigma (B,).
"""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from ldm.diffusion.state import spread, vp_scale
from ldm.types import PredictionType


def to_denoised(prediction: PredictionType, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a network's `output` at state `x` amounts to."""
    match prediction:
        case "eps":
            return x - spread(sigma, x) * output
        case "v":  # alpha * (alpha * x) - s * v
            alpha = vp_scale(sigma)
            return spread(alpha**2, x) * x - spread(alpha * sigma, x) * output
        case "x0":
            return output
        case other:
            assert_never(other)


def from_denoised(prediction: PredictionType, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The network output that `denoised` at state `x` amounts to: the inverse of `to_denoised`. sigma > 0."""
    match prediction:
        case "eps":
            return (x - denoised) / spread(sigma, x)
        case "v":
            alpha = vp_scale(sigma)
            return (spread(alpha**2, x) * x - denoised) / spread(alpha * sigma, x)
        case "x0":
            return denoised
        case other:
            assert_never(other)


def training_target(prediction: PredictionType, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the network should have said when shown `noised(x0, noise, sigma)`."""
    match prediction:
        case "eps":
            return noise
        case "v":
            alpha = vp_scale(sigma)
            return spread(alpha, x0) * noise - spread(alpha * sigma, x0) * x0
        case "x0":
            return x0
        case other:
            assert_never(other)

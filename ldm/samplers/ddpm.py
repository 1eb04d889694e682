"""DDPM's ancestral sampling, with a fixed or a learned variance. See `ldm.samplers.common` for the arguments.

The posterior of the forward process between two levels is normal (Ho et al. 2020, eq. 6-7). In the variance-exploding
scale, with r = sigma_next / sigma, its mean is denoised + r^2 * (x - denoised) and its variance

    small = sigma_next^2 * (1 - r^2)                                           "beta tilde": right if x0 were a point
    large = (sigma^2 - sigma_next^2) * (1 + sigma_next^2) / (1 + sigma^2)      "beta": right if x0 were unit noise

so a good variance lies between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, shrink
from ldm.types import Denoise, NoiseSource, Prediction, Step


def ddpm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, variance: Literal["small", "large"] = "small"
) -> Iterator[Step]:
    """Ancestral sampling with one of the two fixed variances (Ho et al. 2020, section 3.2). Weak order 1."""
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        x = shrink(x, denoised, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            small, large = _variances(sigma, sigma_next)
            x = x + math.sqrt(small if variance == "small" else large) * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, denoised)


def ddpm_learned(
    predict: Callable[[Tensor, Tensor], Prediction], x: Tensor, sigmas: Tensor, noise: NoiseSource
) -> Iterator[Step]:
    """Ancestral sampling with the variance that the network learned (Nichol and Dhariwal 2021, eq. 15).

    `predict` is a `Denoise` that returns the whole Prediction, as `ldm.diffusion.guidance.guided_prediction` makes it;
    its variance v interpolates the logarithms: v * log(large) + (1 - v) * log(small). Raises ValueError without it.
    """
    for index, sigma, sigma_next in intervals(sigmas):
        prediction = predict(x, sigmas[index].expand(x.shape[0]))
        if prediction.variance is None:
            raise ValueError("the network has no learned variance")
        x = shrink(x, prediction.denoised, (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            small, large = _variances(sigma, sigma_next)
            deviation = math.sqrt(small) * (large / small) ** (prediction.variance / 2)
            x = x + deviation * noise(sigma, sigma_next)
        yield Step(index, sigma, sigma_next, x, prediction.denoised)


def _variances(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(small, large), for sigma_next > 0."""
    shed = sigma**2 - sigma_next**2
    return shed * (sigma_next / sigma) ** 2, shed * (1 + sigma_next**2) / (1 + sigma**2)

"""What all samplers share: the walk down the sigmas, the model at one level, and the step towards an estimate.

Samplers hold x = x0 + sigma * noise. The probability-flow ODE is then dx / dsigma = (x - denoised(x, sigma)) / sigma
(Karras et al. 2022, eq. 1 and 3), whose right side is the noise that the model sees in x.

A sampler is a generator function (denoise, x, sigmas, noise, *, its own options) -> Step, Step, ...:

    denoise  (x (B, ...), sigma (B,)) -> denoised (B, ...)
    x        (B, ...) float32, the state at sigmas[0]
    sigmas   (n + 1,) float32 on the CPU, falling; the last may be 0
    noise    noise(sigma, sigma_next) -> unit noise in the shape of x, independent at every call; called by the
             stochastic samplers only

It keeps nothing between calls and changes no tensor that it was given or has yielded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise

_PURE_NOISE = 1000.0


def intervals(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(n + 1,) sigmas -> n times (index, sigma, sigma_next).

    Raises ValueError unless the sigmas are finite and fall, all but the last above 0.
    """
    levels: list[float] = sigmas.tolist()
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] < 0 or not math.isfinite(levels[0]):
        raise ValueError(f"sigmas must be finite and fall to 0 or above, got {levels}")
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        yield index, sigma, sigma_next


def denoise_at(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """The model's estimate of x0 for a batch that is all at one level."""
    return denoise(x, torch.full((x.shape[0],), sigma))


def shrink(x: Tensor, target: Tensor, keep: float) -> Tensor:
    """`x` brought towards `target`, with the fraction `keep` of their difference left.

    With keep = sigma_next / sigma this is the Euler step x + (sigma_next - sigma) * (x - target) / sigma, written so
    that nothing cancels when sigma is large.
    """
    return target + keep * (x - target)


def second_slope_helps(sigma: float, sigma_next: float) -> bool:
    """Whether a slope at its middle or its end serves a step better than the slope at its start alone.

    Not if it ends at 0, where the slope is not known; and not if it starts in all but pure noise, from a sigma that
    stands for infinity (zero terminal SNR): that sigma multiplies the difference of the slopes.
    """
    return sigma_next > 0 and sigma < _PURE_NOISE


def weights_for(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights w, one a node, with sum_k w_k * nodes_k^m = moments_m for m = 0, 1 ...

    With the integrals of u^m as moments they integrate the polynomial through the values at the nodes.
    """
    powers = torch.arange(len(nodes), dtype=torch.float64)[:, None]
    vandermonde = torch.tensor(nodes, dtype=torch.float64) ** powers
    return torch.linalg.solve(vandermonde, torch.tensor(moments, dtype=torch.float64)).tolist()


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How a stochastic step reaches `sigma_next`: (the level to denoise to, the deviation of the noise to add then).

    Their squares add up to sigma_next^2. eta 0 adds nothing; eta 1 adds what the posterior of the forward process
    has, sigma_next^2 * (sigma^2 - sigma_next^2) / sigma^2 (Ho et al. 2020, eq. 7; Song et al. 2020, eq. 16).
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up

"""DDIM run backwards: from a clean state up to the noise that DDIM brings it back from.

Song et al. 2020, section 4.3 (the ODE of eq. 14 in the other direction); Dhariwal and Nichol 2021, appendix F; Ramesh
et al. 2022, section 3. See `ldm.samplers.common` for the scale of x.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, shrink
from ldm.types import Denoise, Step


def ddim_inversion(denoise: Denoise, x: Tensor, sigmas: Tensor, *, refinements: int = 0) -> Iterator[Step]:
    """From x (B, ...) at sigmas[0] up to sigmas[-1]: (n + 1,) float32 on the CPU, all above 0 and rising.

    A step of DDIM down from y lands on x when

        y = x + (sigma_next - sigma) * eps(y, sigma_next)        with eps(y, s) = (y - denoised(y, s)) / s

    In the papers the slope at the step's start, eps(x, sigma), stands in for the one at y. Each refinement puts the y
    found so far into the right side (Pan et al. 2023): one more evaluation a step. What DDIM from the end gives back
    misses x by the order `refinements` + 1 of the steps' length; how far the end is from the true path stays order 1.

    Raises ValueError where the sigmas are not finite, positive and rising.
    """
    falling = list(intervals(sigmas.flip(0)))
    if float(sigmas[0]) <= 0:
        raise ValueError("sigmas must be above 0: at 0 the slope is not known")
    for index, (_, sigma_next, sigma) in enumerate(reversed(falling)):
        denoised = denoise_at(denoise, x, sigma)
        y = shrink(x, denoised, sigma_next / sigma)
        for _ in range(refinements):
            denoised = denoise_at(denoise, y, sigma_next)
            y = _refined(x, y, denoised, sigma, sigma_next)
        x = y
        yield Step(index, sigma, sigma_next, x, denoised)


def _refined(x: Tensor, y: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The right side at y, in the one of two forms that brings y closer to the solution, for data of unit variance.

    Errors in y are multiplied by the derivative of `denoised` in the first form, which is near 0 in much noise; in the
    second by that of `y - denoised`, which is near 0 in little.
    """
    if sigma_next > 1:
        return shrink(x, denoised, sigma_next / sigma)
    return x + (1 - sigma / sigma_next) * (y - denoised)

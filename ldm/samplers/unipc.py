"""UniPC, a predictor and a corrector that share their evaluations (Zhao et al. 2023).

See `ldm.samplers.common` for the arguments and `ldm.samplers.dpmpp` for the time lambda = -log sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from ldm.samplers.common import denoise_at, intervals, shrink, weights_for
from ldm.types import Denoise, NoiseSource, Step

Scaling = Literal["bh1", "bh2"]


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, order: int = 2, scaling: Scaling = "bh2"
) -> Iterator[Step]:
    """Multistep UniPC of the data prediction (Zhao et al. 2023, algorithms 5 and 6), one evaluation a step.

    order:    of the predictor, 1 or more; the corrector adds one: order 2 converges with order 3
    scaling:  the paper's B(h): "bh1" is h, "bh2" is 1 - e^-h

    The order is reached one step at a time, and where the sigmas end at 0 it falls again, to 1 for the last step.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    steps, ends_at_zero = len(sigmas) - 1, float(sigmas[-1]) == 0
    known: list[tuple[float, Tensor]] = []  # (sigma, denoised), oldest first
    before = x  # the corrected state one level up
    used = 0  # how many of the known the predictor looked at
    for index, sigma, sigma_next in intervals(sigmas):
        denoised = denoise_at(denoise, x, sigma)
        if index > 0:
            x = _advance(before, known[-used:], sigma, scaling, denoised)
        known = [*known[-max(order - 1, 1) :], (sigma, denoised)]
        used = min(order, index + 1, steps - index if ends_at_zero else order)
        before, x = x, _advance(x, known[-used:], sigma_next, scaling)
        yield Step(index, sigma, sigma_next, x, denoised)


def _advance(
    x: Tensor, known: Sequence[tuple[float, Tensor]], sigma_next: float, scaling: Scaling, ahead: Tensor | None = None
) -> Tensor:
    """From the last known level to `sigma_next`: predicted from `known`, or corrected with `ahead`, the estimate there.

    The exact step for a still estimate, plus the weighted divided differences of the other estimates.
    """
    sigma, denoised = known[-1]
    ratio = sigma_next / sigma
    moved = shrink(x, denoised, ratio)
    others = [*known[:-1], *([] if ahead is None else [(sigma_next, ahead)])]
    if not others:
        return moved
    h = -math.log(ratio)
    nodes = [math.log(sigma / level) / h for level, _ in others]
    for weight, node, (_, estimate) in zip(_weights(nodes, h, scaling), nodes, others, strict=True):
        moved = moved + weight / node * (estimate - denoised)
    return moved


def _weights(nodes: Sequence[float], h: float, scaling: Scaling) -> list[float]:
    """The weights w of the divided differences, at `nodes` in units of the step (Zhao et al. 2023, eq. 8 and 11).

    The exact solution adds the integral over the step of e^(t - h) * (estimate(t) - denoised). The weights make that
    right for estimate(t) - denoised = (t / h)^i, i = 1 ... n: sum_k w_k * nodes_k^(i - 1) = I_i, and by parts
    I_i = 1 - i / h * I_(i-1). One node only needs B(h) / 2, which has the same order: there alone B(h) matters.
    """
    if len(nodes) == 1:
        return [(h if scaling == "bh1" else -math.expm1(-h)) / 2]
    integral, integrals = -math.expm1(-h), []
    for i in range(1, len(nodes) + 1):
        integral = 1 - i / h * integral
        integrals.append(integral)
    return weights_for(nodes, integrals)

"""Classifier-free guidance: a denoiser under two conditions becomes one denoiser that leans away from the second.

Shapes: x (B, ...), sigma (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import from_denoised, to_denoised
from ldm.diffusion.state import at_least_float32, spread
from ldm.types import Conditioning, Denoise, Prediction

Predict = Callable[[Tensor, Tensor], Prediction]
"""A `Denoise` that also tells the learned variance."""


def guided(
    denoiser: Denoiser,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """denoised = uncond + scale * (cond - uncond) (Ho and Salimans 2022), as all samplers but a few want it.

    scale:     1 means no guidance, and `uncond` is then never evaluated and may be None
    rescale:   0..1, how much of the contrast that guidance adds is taken back (see `rescaled`)
    interval:  (low, high) sigmas, ends included, between which guidance acts (Kynkaanniemi et al. 2024); outside
               the network runs on `cond` alone, at half the cost

    Raises ValueError when guidance is asked for and `uncond` is missing.
    """
    predict = guided_prediction(denoiser, cond, uncond, scale, rescale=rescale, interval=interval)
    return lambda x, sigma: predict(x, sigma).denoised


def guided_prediction(
    denoiser: Denoiser,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Predict:
    """`guided`, with the learned variance that the network gives under `cond`."""
    if scale == 1:
        return lambda x, sigma: denoiser(x, sigma, cond)
    if uncond is None:
        raise ValueError("guidance with a scale other than 1 needs an unconditional conditioning")
    low, high = interval or (0.0, float("inf"))
    both = Conditioning.stack([cond, uncond])

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        inside = (low <= sigma) & (sigma <= high)
        if not inside.any():
            return denoiser(x, sigma, cond)
        pair = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        with_cond, without = pair.denoised.chunk(2)
        scales = torch.where(inside, scale, 1.0)
        denoised = without + spread(scales, without) * (with_cond - without)
        if rescale:
            denoised = _rescaled_denoised(denoiser, denoised, with_cond, x, sigma, rescale)
        return Prediction(denoised, None if pair.variance is None else pair.variance.chunk(2)[0])

    return predict


def rescaled(output: Tensor, output_cond: Tensor, amount: float) -> Tensor:
    """`output`, guided, with its standard deviation brought towards that of `output_cond` (Lin et al. 2023, eq. 15-16).

    Both are network outputs, (B, ...); the deviation is taken over each sample. `amount` 0 changes nothing.
    """
    axes = tuple(range(1, output.ndim))
    ratio = output_cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True)
    return output * (1 + amount * (ratio - 1))


def _rescaled_denoised(
    denoiser: Denoiser, denoised: Tensor, with_cond: Tensor, x: Tensor, sigma: Tensor, amount: float
) -> Tensor:
    """Rescaling is defined on what the network says, so `denoised` goes there and comes back."""
    x = at_least_float32(x)
    output = from_denoised(denoiser.prediction, denoised, x, sigma)
    output_cond = from_denoised(denoiser.prediction, with_cond, x, sigma)
    return to_denoised(denoiser.prediction, rescaled(output, output_cond, amount), x, sigma)

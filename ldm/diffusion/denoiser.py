"""The Denoiser: a network, its noise schedule and its prediction type, seen as one function (x, sigma) -> E[x0 | x].

Training and sampling both go through it, so that they cannot drift apart. It is the only place that knows in which
scale a network likes its input and in which units its timesteps are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import to_denoised
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.state import at_least_float32, spread, vp_scale
from ldm.types import Conditioning, Network, Prediction, PredictionType


@dataclass(frozen=True)
class Denoiser:
    """E[x0 | x] from a network that was trained in VP form.

    network:           its input has the channels of x, its output as many, or twice as many where it learned the
                       variance too (Nichol and Dhariwal 2021)
    schedule:          gives the timestep of a sigma
    prediction:        what the first half (or all) of the output means
    dtype:             in which the network is called; None: in that of its parameters, float32 if it has none
    nearest_timestep:  round timesteps to whole ones, as some samplers elsewhere do; else they are interpolated
    """

    network: Network
    schedule: NoiseSchedule
    prediction: PredictionType
    dtype: torch.dtype | None = None
    nearest_timestep: bool = False

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Prediction:
        """State x = x0 + sigma * noise (B, ...), sigma (B,) > 0, best on the CPU -> the estimate of x0, float32.

        `Prediction.variance`, if the network learned it, is (B, ...) in about [0, 1]: where the log variance of the
        step lies between its two bounds, see `ldm.samplers.ddpm`.
        """
        x = at_least_float32(x)
        output, interpolation = self.output(x, sigma, cond)
        denoised = to_denoised(self.prediction, output, x, sigma)
        return Prediction(denoised, None if interpolation is None else (interpolation + 1) / 2)

    def output(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """The network's own answer for state x (B, ...) at sigma (B,), float32: what a training loss is taken of.

        Returns the prediction, (B, ...), and the learned variance channels as they are, or None. Raises ValueError
        when the output has neither the channels of x nor twice as many.
        """
        x = at_least_float32(x)
        dtype = self.dtype or _parameter_dtype(self.network)
        scaled = (x * spread(vp_scale(sigma), x)).to(dtype)
        timestep = self.schedule.timestep(sigma, nearest=self.nearest_timestep).to(x.device)
        answer = self.network(scaled, timestep, cond.to(dtype=dtype)).to(x.dtype)
        if answer.shape[1] == x.shape[1]:
            return answer, None
        if answer.shape[1] == 2 * x.shape[1]:
            prediction, variance = answer.chunk(2, dim=1)
            return prediction, variance
        raise ValueError(f"the network answered {answer.shape[1]} channels for a state of {x.shape[1]}")


def _parameter_dtype(network: Network) -> torch.dtype:
    """The dtype of the first floating-point parameter."""
    if isinstance(network, nn.Module):
        return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    return torch.float32

"""How much each noise level counts in training."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.prediction import PredictionType
from ldm.diffusion.schedule import NoiseSchedule


def snr_weight(sigma: Tensor, prediction: PredictionType, gamma: float = 5.0, floor: float = 1.0) -> Tensor:
    """Weight of the squared error at each sigma, (B,): min(SNR + floor, gamma) on the error of x0.

    Restated for what the network predicts: the error of x0 is sigma^2 times that of eps and 1 / (SNR + 1) times that of
    v. floor 0 is min-SNR (Hang et al. 2023, section 3.4), as good as blind to the highest levels, where the caption
    alone decides what is drawn. floor 1 with no bound is the plain loss of v (Salimans & Ho 2022, section 4).
    """
    snr = sigma**-2
    clipped = (snr + floor).clamp(max=gamma)
    match prediction:
        case "x0":
            return clipped
        case "eps":
            return clipped / snr
        case "v":
            return clipped / (snr + 1)


def timestep_density(schedule: NoiseSchedule, prediction: PredictionType, gamma: float = 5.0) -> Tensor:
    """How often each timestep should be drawn, (T,) float64 with mean 1: half as its weight says, half evenly.

    Drawn so and divided by this density, the loss has the same mean as with even timesteps, and less variance: low
    noise levels weigh next to nothing. The even half bounds what a rare timestep can count (Owen & Zhou 2000).
    """
    timesteps = torch.arange(len(schedule))
    weight = snr_weight(schedule.sigma(timesteps), prediction, gamma)
    return 0.5 + 0.5 * weight / weight.mean()

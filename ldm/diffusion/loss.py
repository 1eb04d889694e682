"""How much each noise level counts in training."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PredictionType, training_target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.state import noised
from ldm.types import Conditioning


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


def weighted_error(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, timestep: Tensor, cond: Conditioning, gamma: float
) -> Tensor:
    """Weighted squared error of the network's own prediction, the mean over each row of x0, (B,).

    Computed by the same Denoiser that samplers use. timestep: (B,)
    """
    sigma = denoiser.schedule.sigma(timestep)  # on the CPU in float64, where the schedule is
    output, _ = denoiser.output(noised(x0, noise, sigma), sigma, cond)
    target = training_target(denoiser.prediction, x0, noise, sigma)
    error = (output.float() - target).square().flatten(1).mean(dim=1)
    return error * snr_weight(sigma, denoiser.prediction, gamma).to(error)


def timestep_density(schedule: NoiseSchedule, prediction: PredictionType, gamma: float = 5.0) -> Tensor:
    """How often each timestep should be drawn, (T,) float64 with mean 1: half as its weight says, half evenly.

    Drawn so and divided by this density, the loss has the same mean as with even timesteps, and less variance: low
    noise levels weigh next to nothing. The even half bounds what a rare timestep can count (Owen & Zhou 2000).
    """
    timesteps = torch.arange(len(schedule))
    weight = snr_weight(schedule.sigma(timesteps), prediction, gamma)
    return 0.5 + 0.5 * weight / weight.mean()

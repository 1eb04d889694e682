"""How much each noise level counts in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import training_target
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.state import noised
from ldm.types import Conditioning, PredictionType


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


@dataclass(frozen=True)
class Weighing:
    """What an error of the network's prediction counts.

    gamma, floor: of `snr_weight`; gamma None: every level counts alike, as in Ho et al. 2020, eq. 14
    huber:        errors are squared up to about this size and count by their size beyond it (pseudo-Huber,
                  2 huber (sqrt(d^2 + huber^2) - huber)); None: all are squared
    """

    gamma: float | None = 5.0
    floor: float = 1.0
    huber: float | None = None

    def level(self, sigma: Tensor, prediction: PredictionType) -> Tensor:
        """The weight of each sigma, (B,)."""
        if self.gamma is None:
            return torch.ones_like(sigma)
        return snr_weight(sigma, prediction, self.gamma, self.floor)

    def size(self, difference: Tensor) -> Tensor:
        """What each difference counts."""
        if self.huber is None:
            return difference.square()
        return 2 * self.huber * ((difference.square() + self.huber**2).sqrt() - self.huber)


def weighted_error(
    denoiser: Denoiser,
    x0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    cond: Conditioning,
    weighing: Weighing,
    *,
    shown: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted error of the network's own prediction, the mean over each row of x0, (B,).

    Computed by the same Denoiser that samplers use. timestep: (B,)
    shown: the noise that the network sees, where it is to speak of another (input perturbation, Ning et al. 2023)
    mask:  (B, 1, h, w) in [0, 1], how much each place counts
    """
    sigma = denoiser.schedule.sigma(timestep)  # on the CPU in float64, where the schedule is
    output, _ = denoiser.output(noised(x0, noise if shown is None else shown, sigma), sigma, cond)
    target = training_target(denoiser.prediction, x0, noise, sigma)
    size = weighing.size(output.float() - target)
    error = (size if mask is None else size * mask).flatten(1).mean(dim=1)
    return error * weighing.level(sigma, denoiser.prediction).to(error)


DEFAULT_WEIGHING = Weighing()


def timestep_density(
    schedule: NoiseSchedule, prediction: PredictionType, weighing: Weighing = DEFAULT_WEIGHING
) -> Tensor:
    """How often each timestep should be drawn, (T,) float64 with mean 1: half as its weight says, half evenly.

    Drawn so and divided by this density, the loss has the same mean as with even timesteps, and less variance: low
    noise levels weigh next to nothing. The even half bounds what a rare timestep can count (Owen & Zhou 2000).
    """
    timesteps = torch.arange(len(schedule))
    weight = weighing.level(schedule.sigma(timesteps), prediction)
    return 0.5 + 0.5 * weight / weight.mean()

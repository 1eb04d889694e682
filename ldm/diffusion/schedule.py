"""Noise schedules: how much signal and how much noise there is at each timestep.

A variance-preserving (VP) process shows the network x_t = alpha_t * x0 + s_t * noise, where alpha_t^2 + s_t^2 = 1 and
alpha_t^2 is `alphas_cumprod[t]` (Ho et al. 2020, eq. 4). Divided by alpha_t it is x0 + sigma_t * noise with
sigma_t = s_t / alpha_t, the variance-exploding (VE) form in which the samplers work (Karras et al. 2022, table 1).

T timesteps, B batch. A timestep runs from 0 (almost clean) to T - 1 (almost pure noise), and sigma grows with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TIMESTEPS = 1000
SIGMA_TERMINAL = 1e5
"""What stands for the infinite sigma of a zero terminal SNR: the signal left in x_T is then 1e-5 of its size."""

_SNAP = 1e-3
"""A timestep this near to a whole number is that number: float32 sigmas carry about 1e-5 of a timestep of rounding."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule. `alphas_cumprod`: (T,) float64 on the CPU, falling, inside (0, 1).

    Raises ValueError when the tensor is not of that kind.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        values = self.alphas_cumprod
        if values.ndim != 1 or len(values) < 2 or values.dtype != torch.float64 or values.device.type != "cpu":
            raise ValueError("alphas_cumprod must be a float64 vector of at least two values on the CPU")
        if not (values[0] < 1 and values[-1] > 0 and bool((values.diff() < 0).all())):
            raise ValueError("alphas_cumprod must fall and stay inside (0, 1)")

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """(T,) float64, rising: noise over signal at every timestep."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def log_sigmas(self) -> Tensor:
        """(T,) float64: the natural logarithm of `sigmas`."""
        return self.sigmas.log()

    @property
    def sigma_min(self) -> float:
        """sigma of timestep 0 (0.0292 for Stable Diffusion)."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """sigma of timestep T - 1 (14.61 for Stable Diffusion)."""
        return float(self.sigmas[-1])

    def sigma(self, timestep: Tensor) -> Tensor:
        """Timesteps of any shape, whole or not -> sigmas, float64 on the CPU. Between timesteps log sigma is linear."""
        position = timestep.detach().cpu().double().clamp(0, len(self) - 1)
        lower = position.floor().long().clamp(max=len(self) - 2)
        return torch.lerp(self.log_sigmas[lower], self.log_sigmas[lower + 1], position - lower).exp()

    def timestep(self, sigma: Tensor, *, nearest: bool = False) -> Tensor:
        """Sigmas of any shape -> timesteps, float32 on the CPU: the inverse of `sigma`.

        Outside [sigma_min, sigma_max] the end's timestep is returned. `nearest` rounds to whole timesteps, for networks
        that know no others.
        """
        table = self.log_sigmas
        wanted = sigma.detach().cpu().double().log().clamp(table[0], table[-1])
        upper = torch.searchsorted(table, wanted).clamp(1, len(self) - 1)
        below = table[upper - 1]
        position = upper - 1 + (wanted - below) / (table[upper] - below)
        whole = position.round()
        return torch.where((position - whole).abs() < _SNAP, whole, whole if nearest else position).float()

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Whole timesteps (B,) -> (alpha_t, s_t), each (B,) float64 on the CPU: the weights of x0 and of the noise."""
        cumulative = self.alphas_cumprod[timestep.cpu()]
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def snr(self, timestep: Tensor) -> Tensor:
        """Whole timesteps (B,) -> signal-to-noise ratios alpha_t^2 / s_t^2 = 1 / sigma_t^2, (B,) float64 on the CPU."""
        cumulative = self.alphas_cumprod[timestep.cpu()]
        return cumulative / (1 - cumulative)


def from_betas(betas: Tensor) -> NoiseSchedule:
    """The schedule of a process that keeps 1 - beta_t of the variance at step t; (T,) float64."""
    return NoiseSchedule(torch.cumprod(1 - betas, dim=0))


def scaled_linear(start: float = 0.00085, end: float = 0.012, timesteps: int = TIMESTEPS) -> NoiseSchedule:
    """sqrt(beta) is linear: Stable Diffusion's schedule (Rombach et al. 2022)."""
    return from_betas(torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2)


def latent_diffusion() -> NoiseSchedule:
    """`scaled_linear` with the ends of the first latent diffusion models (Rombach et al. 2022, appendix)."""
    return scaled_linear(0.0015, 0.0195)


def upscaler() -> NoiseSchedule:
    """`scaled_linear` with the ends of Stable Diffusion's x4 upscaler."""
    return scaled_linear(1e-4, 0.02)


def linear(start: float = 1e-4, end: float = 0.02, timesteps: int = TIMESTEPS) -> NoiseSchedule:
    """beta is linear: DDPM's schedule (Ho et al. 2020, section 4)."""
    return from_betas(torch.linspace(start, end, timesteps, dtype=torch.float64))


def cosine(offset: float = 0.008, max_beta: float = 0.999, timesteps: int = TIMESTEPS) -> NoiseSchedule:
    """alphas_cumprod is a squared cosine, the betas capped (Nichol and Dhariwal 2021, eq. 17)."""
    time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    cumulative = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - cumulative[1:] / cumulative[:-1]).clamp(max=max_beta))


def sigmoid(start: float = 1e-4, end: float = 0.02, timesteps: int = TIMESTEPS) -> NoiseSchedule:
    """beta rises along a sigmoid over [-6, 6] (Xu et al. 2022, GeoDiff)."""
    rise = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid()
    return from_betas(start + (end - start) * rise)


NOISE_SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "scaled-linear": scaled_linear,
    "latent-diffusion": latent_diffusion,
    "upscaler": upscaler,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
}
"""The noise schedules a model may have been trained with, by the name that its config carries."""


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule shifted and scaled so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).

    alpha_0 stays and alpha_{T-1} becomes 0, whose sigma is infinite. Samplers need a finite one, so the last timestep
    gets SIGMA_TERMINAL. Only v and x0 predictions mean anything there.
    """
    alphas = schedule.alphas_cumprod.sqrt()
    rescaled = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    cumulative = rescaled**2
    cumulative[-1] = 1 / (1 + SIGMA_TERMINAL**2)
    return NoiseSchedule(cumulative)

"""Sigma schedules: at which noise levels a sampler stops on its way down.

Each function takes a model's noise schedule and the number of steps n >= 1 and returns n + 1 falling levels, float32
on the CPU, the last one 0. Any solver runs on any of them. A schedule gives n network evaluations to a solver that
needs one per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule


def karras(schedule: NoiseSchedule, steps: int, *, rho: float = 7.0) -> Tensor:
    """Linear in sigma^(1/rho) from sigma_max to sigma_min (Karras et al. 2022, eq. 5)."""
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return _then_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** rho)


def exponential(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Linear in log sigma from sigma_max to sigma_min."""
    high, low = math.log(schedule.sigma_max), math.log(schedule.sigma_min)
    return _then_zero(torch.linspace(high, low, steps, dtype=torch.float64).exp())


def linspace(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Linear in the timestep from T - 1 to 0, both included; not rounded."""
    return _at(schedule, torch.linspace(len(schedule) - 1, 0, steps, dtype=torch.float64))


def sgm_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Linear in the timestep from T - 1 to 0, without the 0; not rounded (Stability's generative-models)."""
    return _at(schedule, torch.linspace(len(schedule) - 1, 0, steps + 1, dtype=torch.float64)[:-1])


def leading(schedule: NoiseSchedule, steps: int, *, offset: int = 1) -> Tensor:
    """Every (T // n)-th timestep, counted from 0 and shifted by `offset`: Stable Diffusion's own (Song et al. 2020).

    It never starts at T - 1: with one or two steps use another. A whole stride that would leave out more than a tenth
    of the timesteps (n = 600 would begin at 600) gives way to the fraction T / n, rounded down.
    """
    total = len(schedule)
    stride = total // steps
    whole = stride * steps >= 0.9 * total
    timesteps = [i * stride if whole else i * total // steps for i in range(steps)]
    shift = min(offset, total - 1 - timesteps[-1])
    return _at(schedule, torch.tensor(timesteps[::-1]) + shift)


def trailing(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every (T / n)-th timestep, counted down from T - 1 (Lin et al. 2023, table 2): right for zero terminal SNR."""
    total = len(schedule)
    return _at(schedule, torch.tensor([round(total - i * total / steps) - 1 for i in range(steps)]))


def latent_consistency(schedule: NoiseSchedule, steps: int, *, grid: int = 50) -> Tensor:
    """Evenly picked from the `grid` timesteps that a consistency model was distilled on (Luo et al. 2023).

    The grid is T / grid - 1, 2T / grid - 1, ..., T - 1. More steps than the grid has points raise it to the steps.
    """
    total, points = len(schedule), max(grid, steps)
    chosen = [points - i * points // steps for i in range(steps)]
    return _at(schedule, torch.tensor([k * total // points - 1 for k in chosen]))


SCHEDULES: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "karras": karras,
    "exponential": exponential,
    "sgm-uniform": sgm_uniform,
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "lcm": latent_consistency,
}
"""Every sigma schedule by the name a request calls it."""


def end_above_zero(sigmas: Tensor, schedule: NoiseSchedule) -> Tensor:
    """`sigmas` with the last 0 replaced by sigma_min, where Stable Diffusion's DDIM and PLMS end.

    Left as it is when the level before is sigma_min already. The last state is then turned into the latent by
    `ldm.diffusion.state.finish_state`.
    """
    end = torch.tensor([schedule.sigma_min], dtype=sigmas.dtype)
    return torch.cat([sigmas[:-1], end]) if sigmas[-2] > end else sigmas


def _at(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    return _then_zero(schedule.sigma(timesteps))


def _then_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()

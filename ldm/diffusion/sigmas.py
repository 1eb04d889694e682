"""Sigma schedules: at which noise levels a sampler stops on its way down.

Each function takes a model's noise schedule and the number of steps n >= 1 and returns n + 1 falling levels, float32
on the CPU, the last one 0. Any solver runs on any of them. A schedule gives n network evaluations to a solver that
needs one per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule


def karras(schedule: NoiseSchedule, steps: int, *, rho: float = 7.0) -> Tensor:
    """Linear in sigma^(1/rho) from sigma_max to sigma_min (Karras et al. 2022, eq. 5)."""
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return _then_zero(torch.linspace(high, low, steps, dtype=torch.float64) ** rho)


def exponential(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Linear in log sigma from sigma_max to sigma_min."""
    return polyexponential(schedule, steps, rho=1.0)


def polyexponential(schedule: NoiseSchedule, steps: int, *, rho: float = 1.0) -> Tensor:
    """log sigma falls from sigma_max to sigma_min as the rho-th power of a line (k-diffusion).

    Above 1 it falls faster at first; with rho 1, the default of other programs too, it is `exponential`.
    """
    high, low = math.log(schedule.sigma_max), math.log(schedule.sigma_min)
    line = torch.linspace(1, 0, steps, dtype=torch.float64)
    return _then_zero((low + (high - low) * line**rho).exp())


def kl_optimal(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Linear in arctan sigma from sigma_max to sigma_min: for Gaussian data the best (Sabour et al. 2024, theorem 3.1).

    As in ComfyUI the 0 comes after sigma_min; A1111 spends one step less and stops at sigma_min.
    """
    high, low = math.atan(schedule.sigma_max), math.atan(schedule.sigma_min)
    return _then_zero(torch.linspace(high, low, steps, dtype=torch.float64).tan())


def beta(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) over [sigma_min, sigma_max], dense at both ends: A1111's and diffusers' "Beta"."""
    shares = _beta_quantile(torch.linspace(1, 0, steps, dtype=torch.float64))
    return _then_zero(
        torch.lerp(torch.full_like(shares, schedule.sigma_min), shares.new_tensor(schedule.sigma_max), shares)
    )


def beta_timesteps(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) over the timesteps (Lee et al. 2024): ComfyUI's "beta".

    Whole timesteps, unless there are so many that two would fall on one.
    """
    shares = 1 - torch.arange(steps, dtype=torch.float64) / steps
    timesteps = _beta_quantile(shares) * (len(schedule) - 1)
    whole = timesteps.round()
    return _at(schedule, whole if bool((whole.diff() < 0).all()) else timesteps)


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


def simple(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every (T / n)-th timestep, counted down from T - 1 and rounded up (ComfyUI): a rounding apart from `trailing`."""
    total = len(schedule)
    return _at(schedule, torch.tensor([total - 1 - i * total // steps for i in range(steps)]))


_ALIGNED = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
_ALIGNED_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)


def align_your_steps(schedule: NoiseSchedule, steps: int, *, timesteps: Sequence[int] = _ALIGNED) -> Tensor:
    """The levels that lose least in 10 steps, found by optimization for Stable Diffusion 1.5 (Sabour et al. 2024).

    Their table has a level for each of 10 steps and sigma_min; log sigma is interpolated for n steps and sigma_min, and
    sigma_min gives way to 0.
    """
    table = schedule.sigma(torch.tensor(timesteps) * (len(schedule) - 1) / timesteps[0]).log()
    position = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64)[:-1]
    lower = position.long()
    return _then_zero(torch.lerp(table[lower], table[lower + 1], position - lower).exp())


def align_your_steps_sdxl(schedule: NoiseSchedule, steps: int) -> Tensor:
    """`align_your_steps` with the table for SDXL."""
    return align_your_steps(schedule, steps, timesteps=_ALIGNED_SDXL)


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
    "polyexponential": polyexponential,
    "sgm-uniform": sgm_uniform,
    "linspace": linspace,
    "normal": linspace,
    "simple": simple,
    "leading": leading,
    "trailing": trailing,
    "beta": beta,
    "beta-timesteps": beta_timesteps,
    "kl-optimal": kl_optimal,
    "align-your-steps": align_your_steps,
    "align-your-steps-sdxl": align_your_steps_sdxl,
    "lcm": latent_consistency,
}
"""Every sigma schedule by the name a request calls it. "normal" is what ComfyUI and A1111 call linspace."""


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


def _beta_quantile(shares: Tensor, *, a: float = 0.6) -> Tensor:
    """The points below which `shares` of Beta(a, a) lie, 0 to 1, float64.

    Its density is (t (1 - t))^(a - 1). Integrated up to x <= 1/2 that is x^a * sum_k c_k x^k with
    c_k = (1 - a)(2 - a) ... (k - a) / (k! (a + k)), a series that gains a bit a term; half of it all lies below 1/2.
    The inverse is found by bisection of x^a, in which the integral is almost a line.
    """
    k = torch.arange(1, 60, dtype=torch.float64)
    coefficients = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod((k - a) / k, 0)])
    powers = torch.arange(60, dtype=torch.float64)
    coefficients = coefficients / (a + powers)

    def below(root: Tensor) -> Tensor:
        """The integral up to root^(1/a), with half of it all as its unit."""
        series = (coefficients * (root[:, None] ** (1 / a)) ** powers).sum(dim=1)
        return root * series / (0.5**a * (coefficients * 0.5**powers).sum())

    wanted = 2 * torch.minimum(shares, 1 - shares)
    low, high = torch.zeros_like(shares), torch.full_like(shares, 0.5**a)
    for _ in range(60):
        middle = (low + high) / 2
        under = below(middle) < wanted
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    point = low ** (1 / a)
    return torch.where(shares < 0.5, point, 1 - point)

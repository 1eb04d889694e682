"""The samplers: every solver by name, with what a caller has to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm
from ldm.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.heun import heun
from ldm.samplers.lcm import lcm
from ldm.samplers.plms import plms
from ldm.samplers.unipc import unipc
from ldm.types import Denoise, NoiseSource, Step


class Sample(Protocol):
    """A sampler function; `ldm.samplers.common` says what the arguments are."""

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource, /) -> Iterator[Step]:
        """The steps from sigmas[0] to sigmas[-1]."""
        ...


@dataclass(frozen=True)
class Sampler:
    """A sampler and its habits.

    sample:           the generator function
    title:            its name in the metadata that other programs read
    schedule:         the key of `ldm.diffusion.sigmas.SCHEDULES` that suits it
    order:            of convergence: halving the steps' length divides the error by 2^order. For a stochastic sampler
                      the error is that of the mean and variance; 0 for one that takes no limit
    stochastic:       whether it draws noise after the start
    evaluations:      network evaluations a step (PLMS takes one more in all)
    ends_above_zero:  whether Stable Diffusion ends it at sigma_min and not 0, see `ldm.diffusion.sigmas.end_above_zero`
    """

    sample: Sample
    title: str
    schedule: str
    order: int
    stochastic: bool = False
    evaluations: int = 1
    ends_above_zero: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, "DDIM", "leading", order=1, ends_above_zero=True),
    "ddpm": Sampler(ddpm, "DDPM", "trailing", order=1, stochastic=True),
    "plms": Sampler(plms, "PLMS", "leading", order=2, ends_above_zero=True),
    "euler": Sampler(euler, "Euler", "linspace", order=1),
    "euler-a": Sampler(euler_ancestral, "Euler a", "linspace", order=1, stochastic=True),
    "heun": Sampler(heun, "Heun", "karras", order=2, evaluations=2),
    "dpmpp-2m": Sampler(dpmpp_2m, "DPM++ 2M", "karras", order=2),
    "dpmpp-2m-sde": Sampler(dpmpp_2m_sde, "DPM++ 2M SDE", "karras", order=2, stochastic=True),
    "dpmpp-sde": Sampler(dpmpp_sde, "DPM++ SDE", "karras", order=2, stochastic=True, evaluations=2),
    "unipc": Sampler(unipc, "UniPC", "sgm-uniform", order=3),
    "lcm": Sampler(lcm, "LCM", "lcm", order=0, stochastic=True),
}
"""Every sampler by the name a request calls it."""

"""The samplers: every solver by name, with what a caller has to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm
from ldm.samplers.dpm2 import dpm2, dpm2_ancestral
from ldm.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.heun import heun
from ldm.samplers.lcm import lcm
from ldm.samplers.multistep import deis, lms
from ldm.samplers.plms import plms
from ldm.samplers.tcd import tcd
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
    ends_above_zero:  whether it is meant to end at sigma_min and not 0, see `ldm.diffusion.sigmas.end_above_zero`
    brownian:         whether its noise is to be the increments of one Brownian path over sigma, so that the picture
                      stays when the steps change, see `ldm.diffusion.noise.per_image_noise`
    """

    sample: Sample
    title: str
    schedule: str
    order: int
    stochastic: bool = False
    evaluations: int = 1
    ends_above_zero: bool = False
    brownian: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, "DDIM", "leading", order=1, ends_above_zero=True),
    "ddpm": Sampler(ddpm, "DDPM", "trailing", order=1, stochastic=True),
    "plms": Sampler(plms, "PLMS", "leading", order=2, ends_above_zero=True),
    "euler": Sampler(euler, "Euler", "linspace", order=1),
    "euler-a": Sampler(euler_ancestral, "Euler a", "linspace", order=1, stochastic=True),
    "heun": Sampler(heun, "Heun", "karras", order=2, evaluations=2),
    "dpm2": Sampler(dpm2, "DPM2", "karras", order=2, evaluations=2),
    "dpm2-a": Sampler(dpm2_ancestral, "DPM2 a", "karras", order=1, stochastic=True, evaluations=2),
    "lms": Sampler(lms, "LMS", "karras", order=2),
    "deis": Sampler(deis, "DEIS", "karras", order=2),
    "dpmpp-2m": Sampler(dpmpp_2m, "DPM++ 2M", "karras", order=2),
    "dpmpp-2m-sde": Sampler(dpmpp_2m_sde, "DPM++ 2M SDE", "karras", order=2, stochastic=True, brownian=True),
    "dpmpp-3m-sde": Sampler(dpmpp_3m_sde, "DPM++ 3M SDE", "exponential", order=2, stochastic=True, brownian=True),
    "dpmpp-sde": Sampler(dpmpp_sde, "DPM++ SDE", "karras", order=2, stochastic=True, evaluations=2, brownian=True),
    "dpmpp-2s-a": Sampler(dpmpp_2s_ancestral, "DPM++ 2S a", "karras", order=1, stochastic=True, evaluations=2),
    "unipc": Sampler(unipc, "UniPC", "sgm-uniform", order=3),
    "tcd": Sampler(tcd, "TCD", "lcm", order=0, stochastic=True, ends_above_zero=True),
    "lcm": Sampler(lcm, "LCM", "lcm", order=0, stochastic=True),
}
"""Every sampler by the name a request calls it."""

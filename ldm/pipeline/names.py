"""What samplers and schedules are called: our names, and those of A1111, ComfyUI and diffusers for the same.

Spaces, hyphens, underscores and capitals do not matter, "++" is "pp", and "k_" may stand before a sampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

SamplerName = Literal[
    "ddim", "ddpm", "plms", "euler", "euler-a", "heun", "dpm2", "dpm2-a", "lms", "deis", "dpmpp-2m", "dpmpp-2m-sde",
    "dpmpp-3m-sde", "dpmpp-sde", "dpmpp-2s-a", "unipc", "tcd", "lcm",
]  # fmt: skip
ScheduleName = Literal[
    "karras", "exponential", "polyexponential", "sgm-uniform", "linspace", "normal", "simple", "leading", "trailing",
    "beta", "beta-timesteps", "kl-optimal", "align-your-steps", "align-your-steps-sdxl", "lcm",
]  # fmt: skip

SCHEDULE_TITLES: dict[str, str] = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm-uniform": "SGM Uniform",
    "linspace": "Uniform",
    "normal": "Normal",
    "simple": "Simple",
    "leading": "DDIM",
    "trailing": "Trailing",
    "beta": "Beta",
    "beta-timesteps": "Beta Timesteps",
    "kl-optimal": "KL Optimal",
    "align-your-steps": "Align Your Steps",
    "align-your-steps-sdxl": "Align Your Steps",
    "lcm": "LCM",
}
"""A1111's names of the sigma schedules, for metadata; trailing, beta-timesteps and lcm are ours, as it has none.

Align Your Steps is one name for two tables, between which it chooses by the model, and so do we.
"""

SAMPLER_ALIASES: dict[str, tuple[str, ...]] = {
    "ddim": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
    "plms": ("PNDM", "PNDMScheduler"),
    "euler": ("EulerDiscreteScheduler",),
    "euler-a": ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
    "heun": ("HeunDiscreteScheduler",),
    "dpm2": ("KDPM2DiscreteScheduler",),
    "dpm2-a": ("dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    "lms": ("LMSDiscreteScheduler",),
    "deis": ("DEISMultistepScheduler",),
    "dpmpp-2m": ("DPMSolverMultistepScheduler",),
    "dpmpp-2m-sde": ("dpmpp_2m_sde_gpu",),
    "dpmpp-3m-sde": ("dpmpp_3m_sde_gpu",),
    "dpmpp-sde": ("dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
    "dpmpp-2s-a": ("dpmpp_2s_ancestral",),
    "unipc": ("uni_pc_bh2", "UniPCMultistepScheduler"),
    "tcd": ("TCDScheduler",),
    "lcm": ("LCMScheduler",),
}
"""Other names of the samplers. ComfyUI's gpu variants differ in where their noise is drawn only."""

SCHEDULE_ALIASES: dict[str, tuple[str, ...]] = {
    "karras": ("use_karras_sigmas", "ka"),
    "exponential": ("use_exponential_sigmas", "exp"),
    "linspace": ("Uniform",),
    "leading": ("ddim_uniform", "DDIM"),
    "beta": ("use_beta_sigmas",),
    "align-your-steps": ("AlignYourStepsScheduler", "AYS"),
    "align-your-steps-sdxl": ("AYS SDXL",),
}
"""Other names of the schedules. "ka" and "exp" end A1111's short sampler names, as in k_dpmpp_2m_ka."""

SAMPLERS_LACKED: dict[str, str] = {
    "DPM fast": "dpm2",
    "DPM adaptive": "dpm2",
    "Restart": "heun",
    "HeunPP2": "heun",
    "IPNDM": "plms",
    "IPNDMScheduler": "plms",
    "IPNDM_V": "lms",
    "DPM++ 2M SDE Heun": "dpmpp-2m-sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp-2m-sde",
    "DPMSolverSinglestepScheduler": "dpmpp-2s-a",
    "DDIM CFG++": "ddim",
    "euler_cfg_pp": "euler",
    "euler_ancestral_cfg_pp": "euler-a",
    "dpmpp_2s_ancestral_cfg_pp": "dpmpp-2s-a",
    "dpmpp_2m_cfg_pp": "dpmpp-2m",
    "res_multistep": "dpmpp-2m",
    "res_multistep_ancestral": "dpmpp-2m-sde",
    "gradient_estimation": "euler",
    "er_sde": "dpmpp-3m-sde",
    "seeds_2": "dpmpp-sde",
    "seeds_3": "dpmpp-sde",
    "sa_solver": "dpmpp-3m-sde",
    "SASolverScheduler": "dpmpp-3m-sde",
}
"""Samplers of the other programs that are not here, and the nearest that is."""


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()).replace("+", "p")


def _table(aliases: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {_folded(alias): name for name, others in aliases.items() for alias in (name, *others)}


_SAMPLERS = _table(SAMPLER_ALIASES)
_SCHEDULES: dict[str, str | None] = {
    **_table({name: SCHEDULE_ALIASES.get(name, ()) for name in SCHEDULE_TITLES}),
    "automatic": None,
}
_LACKED = {_folded(name): nearest for name, nearest in SAMPLERS_LACKED.items()}


def sampler_named(text: str) -> tuple[str, str | None]:
    """Any program's name of a sampler -> (ours, the schedule that stands at its end as in "DPM++ 2M Karras", if any).

    A name that is no sampler's comes back as it is, for the request to refuse.
    """
    return next(((_SAMPLERS[name], schedule) for name, schedule in _readings(text) if name in _SAMPLERS), (text, None))


def schedule_named(text: str) -> str | None:
    """Any program's name of a schedule -> ours; None for "Automatic", which leaves it to the sampler and the model.

    A name that is no schedule's comes back as it is, for the request to refuse.
    """
    return _SCHEDULES.get(_folded(text), text)


def nearest_sampler(text: str) -> str | None:
    """The sampler that is nearest to one that other programs have and we lack; None for any other name."""
    return next((_LACKED[name] for name, _ in _readings(text) if name in _LACKED), None)


def _readings(text: str) -> Iterator[tuple[str, str | None]]:
    """All ways to take a sampler's name apart: (folded name, schedule at its end)."""
    whole = _folded(text)
    ends = ((whole.removesuffix(end), schedule) for end, schedule in _SCHEDULES.items() if whole.endswith(end))
    for name, schedule in ((whole, None), *ends):
        yield name, schedule
        yield name.removeprefix("k"), schedule

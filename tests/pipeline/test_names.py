"""Names of samplers and schedules as A1111, ComfyUI and diffusers write them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast, get_args

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import LdmError
from ldm.models.presets import sd1, sdxl
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.names import (
    SAMPLER_ALIASES,
    SAMPLERS_LACKED,
    SCHEDULE_ALIASES,
    SCHEDULE_TITLES,
    SamplerName,
    ScheduleName,
    nearest_sampler,
    sampler_named,
    schedule_named,
)
from ldm.pipeline.prepare import resolve
from ldm.pipeline.request import GenerateRequest
from ldm.samplers import SAMPLERS

A1111_SAMPLERS = {
    "DPM++ 2M": "dpmpp-2m",
    "DPM++ SDE": "dpmpp-sde",
    "DPM++ 2M SDE": "dpmpp-2m-sde",
    "DPM++ 2S a": "dpmpp-2s-a",
    "DPM++ 3M SDE": "dpmpp-3m-sde",
    "Euler a": "euler-a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2-a",
    "DEIS": "deis",
    "DDIM": "ddim",
    "PLMS": "plms",
    "UniPC": "unipc",
    "LCM": "lcm",
    "TCD": "tcd",
    "k_euler_a": "euler-a",
    "k_lms": "lms",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2-a",
    "k_dpmpp_2s_a": "dpmpp-2s-a",
}
COMFYUI_SAMPLERS = {
    "euler": "euler",
    "euler_ancestral": "euler-a",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2-a",
    "lms": "lms",
    "dpmpp_2s_ancestral": "dpmpp-2s-a",
    "dpmpp_sde": "dpmpp-sde",
    "dpmpp_sde_gpu": "dpmpp-sde",
    "dpmpp_2m": "dpmpp-2m",
    "dpmpp_2m_sde": "dpmpp-2m-sde",
    "dpmpp_2m_sde_gpu": "dpmpp-2m-sde",
    "dpmpp_3m_sde": "dpmpp-3m-sde",
    "dpmpp_3m_sde_gpu": "dpmpp-3m-sde",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "deis": "deis",
    "ddim": "ddim",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
A1111_SCHEDULES = {
    "Automatic": None,
    "Uniform": "linspace",
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm-uniform",
    "KL Optimal": "kl-optimal",
    "Align Your Steps": "align-your-steps",
    "Simple": "simple",
    "Normal": "normal",
    "DDIM": "leading",
    "Beta": "beta",
    "sgm_uniform": "sgm-uniform",
    "align_your_steps": "align-your-steps",
}
COMFYUI_SCHEDULES = {
    "normal": "normal",
    "karras": "karras",
    "exponential": "exponential",
    "sgm_uniform": "sgm-uniform",
    "simple": "simple",
    "ddim_uniform": "leading",
    "kl_optimal": "kl-optimal",
    "AlignYourStepsScheduler": "align-your-steps",
}


@pytest.mark.parametrize(("theirs", "ours"), [*A1111_SAMPLERS.items(), *COMFYUI_SAMPLERS.items()])
def test_samplers(theirs, ours):
    assert sampler_named(theirs) == (ours, None)
    assert GenerateRequest(prompt="x", sampler=theirs).sampler == ours


@pytest.mark.parametrize(("theirs", "ours"), [*A1111_SCHEDULES.items(), *COMFYUI_SCHEDULES.items()])
def test_schedules(theirs, ours):
    assert schedule_named(theirs) == ours
    assert GenerateRequest(prompt="x", schedule=theirs).schedule == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("DPM++ 2M Karras", ("dpmpp-2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp-2m-sde", "exponential")),
        ("DPM++ 3M SDE Polyexponential", ("dpmpp-3m-sde", "polyexponential")),
        ("LMS Karras", ("lms", "karras")),
        ("DPM2 a Karras", ("dpm2-a", "karras")),
        ("Euler a SGM Uniform", ("euler-a", "sgm-uniform")),
        ("Euler Automatic", ("euler", None)),
        ("k_dpmpp_2m_ka", ("dpmpp-2m", "karras")),
        ("k_dpmpp_3m_sde_exp", ("dpmpp-3m-sde", "exponential")),
        ("  dpm++  2m_KARRAS ", ("dpmpp-2m", "karras")),
    ],
)
def test_samplers_with_a_schedule_at_the_end(theirs, ours):
    assert sampler_named(theirs) == ours
    request = GenerateRequest(prompt="x", sampler=theirs)
    assert (request.sampler, request.schedule) == ours


def test_a_schedule_that_is_asked_for_comes_before_the_sampler_s():
    assert GenerateRequest(prompt="x", sampler="DPM++ 2M Karras", schedule="Beta").schedule == "beta"  # pyright: ignore[reportArgumentType]
    request = GenerateRequest(prompt="x", sampler="DPM++ 2M Karras", schedule="Automatic")  # pyright: ignore[reportArgumentType]
    assert request.schedule == "karras"
    assert request.changed(sampler="Euler a").sampler == "euler-a"


@pytest.mark.parametrize(
    ("config", "asked", "used"),
    [
        (sd1(), "Align Your Steps", "align-your-steps"),
        (sdxl(), "Align Your Steps", "align-your-steps-sdxl"),
        (sd1(), "align-your-steps-sdxl", "align-your-steps-sdxl"),
        (sdxl(), "Automatic", "karras"),
        (replace(sdxl(), zero_terminal_snr=True), "Automatic", "trailing"),
        (replace(sdxl(), zero_terminal_snr=True), "Karras", "karras"),
    ],
)
def test_the_schedule_suits_the_model(config, asked, used):
    model = cast(LatentDiffusion, SimpleNamespace(config=config))
    request = GenerateRequest(prompt="x", schedule=asked)
    assert resolve(model, request).schedule == used


def test_our_names_and_titles_lead_back():
    assert tuple(SCHEDULE_TITLES) == get_args(ScheduleName) and tuple(SAMPLER_ALIASES) == get_args(SamplerName)
    for name, sampler in SAMPLERS.items():
        assert sampler_named(name) == sampler_named(sampler.title) == (name, None)
    for name, title in SCHEDULE_TITLES.items():
        assert schedule_named(name) == name
        assert schedule_named(title) == name.removesuffix("-sdxl")


def test_no_name_has_two_meanings():
    for table in (SAMPLER_ALIASES, SCHEDULE_ALIASES):
        for name, aliases in table.items():
            read = {(schedule_named(a) if table is SCHEDULE_ALIASES else sampler_named(a)[0]) for a in aliases}
            assert read <= {name}
    for lacked in SAMPLERS_LACKED:
        assert sampler_named(lacked) == (lacked, None)


def test_diffusers_classes():
    """Every name is a class's, and the class is what we take it for."""
    named = {alias: name for name, others in SAMPLER_ALIASES.items() for alias in others if alias.endswith("Scheduler")}
    assert len(named) == 15
    for alias, name in named.items():
        assert hasattr(diffusers, alias)
        assert sampler_named(alias) == (name, None)
    assert sampler_named("DPMSolverMultistepScheduler Karras") == ("dpmpp-2m", "karras")


@pytest.mark.parametrize("name", [*SAMPLERS_LACKED, "DPM++ 2M SDE Heun Karras", "k_dpm_ad", "dpm_fast"])
def test_samplers_that_are_not_here_name_the_nearest(name):
    nearest = nearest_sampler(name)
    hint = f"the nearest is {nearest}$" if nearest else "did you mean"
    with pytest.raises(LdmError, match=rf"^sampler: found \".*\", expected one of ddim, .*, lcm; {hint}"):
        GenerateRequest(prompt="x", sampler=name)
    assert nearest is None or nearest in SAMPLERS


@pytest.mark.parametrize("name", ["", "euler b", "日本euler", "karras", "DPM++", "euler;", "k", "x" * 10_000])
def test_other_names_are_refused(name):
    with pytest.raises(LdmError, match=r"^sampler: found"):
        GenerateRequest(prompt="x", sampler=name)
    with pytest.raises(LdmError, match=r"^schedule: found"):
        GenerateRequest(prompt="x", schedule=name + "x")


@given(st.text(max_size=40))
def test_any_text_is_read_or_given_back(text):
    sampler, schedule = sampler_named(text)
    assert sampler in get_args(SamplerName) or (sampler == text and schedule is None)
    assert schedule_named(text) in (*get_args(ScheduleName), None, text)

"""AUTOMATIC1111's text, as its web UI writes it into pictures and reads it back:

    the prompt, perhaps in many lines
    Negative prompt: likewise
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: "a, b"

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ldm.pipeline.images import read_picture
from ldm.pipeline.request import Control, GenerateRequest, whole_steps

SETTING = re.compile(r'(\w[\w \-/]{1,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A key and its value. The web UI's own rule, but that a key has a greatest length, so that no text takes for ever."""

NEGATIVE = "Negative prompt:"
OURS = "ldm-"
"""What the version of a text that we wrote begins with; the web UI's are numbers, by which it changes its reading."""

RNG = {"cpu": "CPU", "philox": "NV", "comfy": "CPU"}
"""Whose noise. NV is what the web UI calls a GPU's noise made anywhere. ComfyUI's is the CPU's for one picture, or the
first of several; our JSON tells the two apart."""

EMPHASIS = {"no-norm": "No norm", "ignore": "Ignore", "literal": "None", "comfy": "ComfyUI", "compel": "compel"}
"""The web UI has the first three, and takes others for its own rule, "Original", which it does not write."""

UPSCALERS = {"latent": "Latent", "lanczos": "Lanczos"}
FILLS = {"noise": "latent noise", "zero": "latent nothing"}


@dataclass(frozen=True)
class Infotext:
    """A text taken apart. settings: of its last line, as they stand there, without quotes."""

    prompt: str
    negative: str
    settings: dict[str, str]


def write(prompt: str, negative: str, settings: Mapping[str, object]) -> str:
    """The text. A value that holds what divides values is written as a JSON string."""
    lines = [prompt, f"{NEGATIVE} {negative}" if negative else ""]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    text = "\n".join(line for line in lines if line)
    return text.encode("utf-8", "backslashreplace").decode()  # a file's name may hold bytes that are no text


def parse(text: str) -> Infotext:
    """The reverse. Never fails: a text without a line of settings is all prompt.

    The settings are the last line, if it holds three at least, or else the last one that begins with "Steps:", since
    some extensions write more below it.
    """
    lines = text.rstrip().split("\n")
    found = next((index for index in reversed(range(len(lines))) if _is_settings(lines, index)), len(lines))
    settings = {key: _unquoted(value) for key, value in SETTING.findall(lines[found])} if found < len(lines) else {}
    lines = lines[:found]
    start = next((index for index, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE).removeprefix(" ")
    return Infotext("\n".join(lines[:start]), negative, settings)


def _is_settings(lines: list[str], index: int) -> bool:
    line = lines[index]
    return (index == len(lines) - 1 or line.startswith("Steps: ")) and len(SETTING.findall(line)) >= 3


def settings_of(request: GenerateRequest) -> dict[str, object]:
    """What a resolved request says beyond sampler, size and model, by the web UI's names and in its order."""
    settings: dict[str, object] = {}
    if request.variation_strength and request.variation_seed is not None:
        settings["Variation seed"] = request.variation_seed
        settings["Variation seed strength"] = number(request.variation_strength)
    if request.image is not None:
        settings["Denoising strength"] = number(request.share)
    elif request.highres is not None:
        settings["Denoising strength"] = number(request.highres.strength)
    if request.clip_skip is not None and request.clip_skip > 1:
        settings["Clip skip"] = request.clip_skip
    if request.image is not None:
        settings["Init image hash"] = hashlib.md5(read_picture(request.image).tobytes()).hexdigest()
    settings["RNG"] = RNG[request.rng]
    return settings | _second_pass(request) | _mask(request) | _guidance(request)


def _second_pass(request: GenerateRequest) -> dict[str, object]:
    """Other passes and networks; those of a prior have names of ours.

    The web UI runs all of "Hires steps"; we run `strength` of `highres.steps`, so this is how many that gives."""
    settings: dict[str, object] = {}
    if (highres := request.highres) is not None:
        settings["Hires upscale"] = number(highres.scale)
        settings["Hires steps"] = whole_steps(highres.strength, highres.steps or request.steps)
        settings["Hires upscaler"] = UPSCALERS[highres.upscale]
    if request.refine_at is not None:
        settings["Refiner switch at"] = number(request.refine_at)
    if (prior := request.prior) is not None:
        settings["Prior CFG scale"] = number(prior.guidance)
        settings["Prior steps"] = prior.steps
        settings["Prior candidates"] = prior.choose
    return settings


def _mask(request: GenerateRequest) -> dict[str, object]:
    if request.mask is None:
        return {}
    settings: dict[str, object] = {"Mask mode": "Inpaint not masked"} if request.mask_invert else {}
    settings["Mask blur"] = request.mask_blur
    if request.mask_fill != "original":
        settings["Masked content"] = FILLS[request.mask_fill]
    if request.only_masked:
        settings |= {"Inpaint area": "Only masked", "Masked area padding": request.mask_padding}
    return settings


def _guidance(request: GenerateRequest) -> dict[str, object]:
    """What of guidance has a name that others read: of the core, of Forge, of extensions."""
    settings: dict[str, object] = {}
    if request.emphasis in EMPHASIS:
        settings["Emphasis"] = EMPHASIS[request.emphasis]
    if request.guidance_start:
        settings["Skip Early CFG"] = number(request.guidance_start)
    if request.rescale:
        settings["CFG rescale"] = number(request.rescale)
    if request.eta is not None:
        settings["Eta"] = number(request.eta)
    return settings | {f"ControlNet {index}": _control(control) for index, control in enumerate(request.controls)}


def _control(control: Control) -> str:
    """One ControlNet as the web UI's extension writes it."""
    mode = "ControlNet is more important" if control.guess else "Balanced"
    return (
        f"Module: {'canny' if control.canny else 'none'}, Model: {control.network}, Weight: {number(control.weight)}, "
        f"Guidance Start: {number(control.start)}, Guidance End: {number(control.end)}, Control Mode: {mode}"
    )


def number(value: float) -> str:
    """The shortest text that reads back as this number: 7, 7.5."""
    return repr(float(value)).removesuffix(".0")


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(value: str) -> str:
    try:
        text = json.loads(value) if value.startswith('"') else value.strip()
    except ValueError:
        return value
    return text if isinstance(text, str) else value

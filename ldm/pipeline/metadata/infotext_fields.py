"""What the settings of an AUTOMATIC1111 text mean in a request of ours, and which have no counterpart.

The web UI's own numbers of steps are followed to the step: image-to-image there runs one step more than we do at the
same strength, and a second pass runs all of its steps, from where `strength` of a longer run would begin
(`setup_img2img_steps` of its source).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, get_args

from ldm.pipeline.metadata.infotext import EMPHASIS, FILLS, OURS, UPSCALERS, Infotext
from ldm.pipeline.metadata.remake import Remake
from ldm.pipeline.names import SamplerName, ScheduleName, nearest_sampler, sampler_named, schedule_named
from ldm.pipeline.request import TAKES_ETA
from ldm.pipeline.validation import shown

TOLD_ELSEWHERE = {
    "Model", "Model hash", "Version", "User", "Hashes", "Init image hash", "Pad conds", "Created Date",
    "Civitai resources", "Civitai metadata", "Downcast alphas_cumprod",
}  # fmt: skip
"""Settings that are no field of a request, and lose nothing."""

OF_MODELS = ("VAE", "VAE hash", "Lora hashes", "TI hashes", "Refiner", "Prior")
"""Files that a person has to give again."""

SAMPLERS, SCHEDULES = get_args(SamplerName), get_args(ScheduleName)
BRING_SCHEDULES = ("ddim", "plms", "unipc", "lcm", "tcd")

HIGHEST = 0.999
"""Of the strengths of the web UI, for its division."""


class _Settings:
    """The settings not read yet, and what became of those that were: fields, and lines of what cannot be matched."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.rest = dict(settings)
        self.fields: dict[str, Any] = {}
        self.misses: list[str] = []

    def text(self, key: str) -> str | None:
        return self.rest.pop(key, None)

    def miss(self, key: str, value: str, why: str) -> None:
        self.misses.append(f"{key}: {shown(value)} {why}")

    def read(self, key: str, kind: Callable[[str], Any], otherwise: Any = None) -> Any:
        """The value as `kind` reads it; `otherwise` where there is none, or none that can be read."""
        value = self.text(key)
        try:
            return otherwise if value is None else kind(value)
        except ValueError:
            self.miss(key, value or "", "is no number")
            return otherwise

    def move(self, key: str, name: str, kind: Callable[[str], Any]) -> None:
        """A setting that is a field as it stands."""
        if (value := self.read(key, kind)) is not None:
            self.fields[name] = value

    def choose(self, key: str, name: str, choices: dict[str, str]) -> None:
        """A setting whose values have other names in ours."""
        if (value := self.text(key)) is not None:
            if value in choices:
                self.fields[name] = choices[value]
            else:
                self.miss(key, value, f"is not known here; {name} stays at its default")


def remake_of(text: Infotext) -> Remake:
    """The request that a text describes, unchecked, and a line for each thing that cannot be matched."""
    version = text.settings.get("Version", "")
    ours, comfy = version.startswith(OURS), version.startswith("ComfyUI")
    settings = _Settings(text.settings)
    settings.fields = {"prompt": text.prompt, "negative": text.negative}
    settings.fields |= {"rng": "comfy", "emphasis": "comfy"} if comfy else {"rng": "philox"}
    _plain(settings)
    _sampler(settings)
    _size(settings)
    _prior(settings)
    settings.choose("RNG", "rng", {"GPU": "philox", "NV": "philox", "CPU": "comfy" if comfy else "cpu"})
    pictures = _pictures(settings, ours)
    for key in OF_MODELS:
        if value := settings.text(key):
            settings.miss(key, value, "is a file that has to be given again")
    if left := [key for key in settings.rest if key not in TOLD_ELSEWHERE]:
        settings.misses.append(f"not known here and left out: {', '.join(map(shown, left[:20]))}")
    if not ours:
        settings.misses += _history(version, comfy)
    return Remake(
        source="ldm" if ours else "ComfyUI, as AUTOMATIC1111 text" if comfy else "AUTOMATIC1111 or alike",
        fields=settings.fields,
        pictures=pictures,
        model=text.settings.get("Model"),
        model_hash=text.settings.get("Model hash"),
        misses=tuple(settings.misses),
    )


def _plain(settings: _Settings) -> None:
    """What is the same in both, but for its name."""
    settings.move("Steps", "steps", int)
    settings.move("CFG scale", "guidance", _finite)
    settings.move("CFG rescale", "rescale", _finite)
    settings.move("Skip Early CFG", "guidance_start", _finite)
    settings.move("Seed", "seed", int)
    settings.move("Variation seed", "variation_seed", int)
    settings.move("Variation seed strength", "variation_strength", _finite)
    settings.move("Refiner switch at", "refine_at", _finite)
    settings.move("Clip skip", "clip_skip", int)
    settings.choose("Emphasis", "emphasis", {"Original": "a1111"} | _reversed(EMPHASIS))


def _sampler(settings: _Settings) -> None:
    """Sampler, schedule and eta. Before 1.9 the first two were one name ("DPM++ 2M Karras").

    A schedule that is not named, or "Automatic", is the model's own even levels, but for samplers that bring theirs.
    """
    named = settings.text("Sampler")
    sampler, schedule = (None, None) if named is None else sampler_named(named)
    if named is not None and sampler not in SAMPLERS:
        lacked, sampler = sampler, nearest_sampler(named)
        instead = f"the nearest, {sampler}," if sampler else "the default"
        settings.miss("Sampler", lacked or named, f"is not known here; {instead} takes its place")
    if sampler is not None:
        settings.fields["sampler"] = sampler
    scheduled = settings.text("Schedule type")
    schedule = schedule if scheduled is None else schedule_named(scheduled)
    if schedule is not None and schedule not in SCHEDULES:
        settings.miss("Schedule type", schedule, "is not known here; what suits the sampler takes its place")
    elif schedule is not None:
        settings.fields["schedule"] = schedule
    elif sampler is not None and sampler not in BRING_SCHEDULES:
        settings.fields["schedule"] = "linspace"
    old = settings.read("Eta DDIM", _finite)
    if (eta := settings.read("Eta", _finite, old)) is not None:
        if sampler in TAKES_ETA:
            settings.fields["eta"] = eta
        elif eta != 1:  # the web UI's default
            settings.miss("Eta", f"{eta:g}", "does not act on this sampler here")


def _size(settings: _Settings) -> None:
    if (size := settings.text("Size")) is not None:
        if sides := _sides(size):
            settings.fields["width"], settings.fields["height"] = sides
        else:
            settings.miss("Size", size, "is no WIDTHxHEIGHT")


def _prior(settings: _Settings) -> None:
    """How a prior was asked, which is in texts of ours alone."""
    names = {
        "guidance": ("Prior CFG scale", _finite),
        "steps": ("Prior steps", int),
        "choose": ("Prior candidates", int),
    }
    found = {name: settings.read(key, kind) for name, (key, kind) in names.items()}
    if asked := {name: value for name, value in found.items() if value is not None}:
        settings.fields["prior"] = asked


def _sides(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    return (int(found[1]), int(found[2])) if found else None


def _pictures(settings: _Settings, ours: bool) -> dict[str, str | None]:
    """A second pass or a start from a picture, by which of them the strength belongs to; and which pictures it takes.

    A text has no hash of a picture's file.
    """
    strength = settings.read("Denoising strength", _finite)
    scale = _scale(settings)
    masked = _mask(settings, ours)
    if scale is not None and scale > 1 and strength:
        settings.fields["highres"] = _second_pass(settings, scale, strength, ours)
    elif strength is not None or masked:
        steps = settings.fields.get("steps")
        if strength is not None and steps and not ours:
            strength = min(1.0, (int(min(strength, HIGHEST) * steps) + 1) / steps)
        if strength is not None:
            settings.fields["strength"] = strength
        return dict.fromkeys(("image", "mask") if masked else ("image",))
    return {}


def _scale(settings: _Settings) -> float | None:
    """How much larger the second pass is. One that changes the shape has no counterpart."""
    scale, resized = settings.read("Hires upscale", _finite), settings.text("Hires resize")
    if resized is None:
        return scale
    sides, width = _sides(resized), settings.fields.get("width")
    if not sides or not width or not any(sides):
        settings.miss("Hires resize", resized, "cannot be followed; there is no second pass")
        return None
    height = settings.fields["height"]
    if all(sides) and sides[0] * height != sides[1] * width:
        settings.miss("Hires resize", resized, "changes the shape; the width is followed")
    return sides[0] / width if sides[0] else sides[1] / height


def _second_pass(settings: _Settings, scale: float, strength: float, ours: bool) -> dict[str, Any]:
    """Of a run of how many steps its steps are the last: the web UI rounds down; up, a share of ours comes back."""
    upscaler = settings.text("Hires upscaler") or UPSCALERS["latent"]
    ways = _reversed(UPSCALERS)
    if upscaler not in ways:
        settings.miss("Hires upscaler", upscaler, "is not known here; the nearest of ours takes its place")
    way = ways.get(upscaler, "latent" if upscaler.startswith("Latent") else "lanczos")
    run = settings.read("Hires steps", int) or settings.fields.get("steps") or 0
    if run < 1:
        return {"scale": scale, "upscale": way, "strength": min(1.0, strength)}
    longer = run / strength if ours else run / min(strength, HIGHEST)
    steps = max(run, math.ceil(longer - 1e-9) if ours else int(longer))
    return {"scale": scale, "upscale": way, "strength": run / steps, "steps": steps}


def _mask(settings: _Settings, ours: bool) -> bool:
    """Whether there is a mask; and the fields that go with it."""
    if not {"Mask mode", "Mask blur", "Masked content", "Inpaint area"} & set(settings.rest):
        return False
    settings.fields["mask_blur"] = settings.read("Mask blur", int, 0)
    settings.choose("Mask mode", "mask_invert", {"Inpaint masked": "", "Inpaint not masked": "yes"})
    settings.fields["mask_invert"] = bool(settings.fields.get("mask_invert"))
    settings.choose("Masked content", "mask_fill", {"original": "original"} | _reversed(FILLS))
    settings.fields["only_masked"] = settings.text("Inpaint area") == "Only masked"
    settings.move("Masked area padding", "mask_padding", int)
    if not ours:
        settings.misses.append("mask: its edge is blurred by another rule here")
    return True


def _history(version: str, comfy: bool) -> list[str]:
    """What depends on who wrote the text, and when."""
    said = ["numbers: another program's picture comes out alike, not the same"]
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})", version.rpartition("v")[2])  # Forge: f2.0.1v1.10.1
    if not comfy and (found is None or (int(found[1]), int(found[2])) < (1, 6)):
        whose = f"version {shown(version)}" if version else "no version"
        said.append(f"{whose}: before 1.6 the web UI changed prompts in a second pass at other steps")
    return said


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _reversed(titles: dict[str, str]) -> dict[str, str]:
    return {title: name for name, title in titles.items()}

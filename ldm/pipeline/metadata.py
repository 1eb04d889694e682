"""What a picture's file says about how it was made: AUTOMATIC1111's `parameters` text, and our request as JSON.

Other programs read the first, `ldm` the second. Reading never loads a model or opens a path that metadata names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from ldm import __version__
from ldm.errors import LdmError
from ldm.pipeline.files import reason
from ldm.pipeline.request import GenerateRequest
from ldm.samplers import SAMPLERS

if TYPE_CHECKING:
    from ldm.pipeline.sample import Picture

KEYWORD = "ldm"
"""The PNG text chunk that holds our JSON."""

SCHEDULE_TITLES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm-uniform": "SGM Uniform",
    "linspace": "Uniform",
    "leading": "DDIM",
    "trailing": "Trailing",
    "lcm": "LCM",
}
"""Other programs' names of the sigma schedules; the last two are ours, as they have none."""


@dataclass(frozen=True)
class Metadata:
    """What was read from a picture: other programs' text, and our record, each None where there is none.

    record: {"version", "request", "model", "model_hash", "dtype", "notes"}; its request as `GenerateRequest.record`.
    """

    parameters: str | None
    record: dict[str, Any] | None

    def request(self) -> GenerateRequest | None:
        """The request to make the picture again, if ours is there and needs no picture to start from."""
        if self.record is None or "image_sha256" in self.record["request"]:
            return None
        return GenerateRequest(**self.record["request"])


def png_text(picture: Picture, model_hash: str | None = None) -> PngImagePlugin.PngInfo:
    """Both text chunks of a picture. model_hash: the SHA-256 of the model's file, in hexadecimal."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters_text(picture, model_hash))
    record = {
        "version": __version__,
        "request": picture.request.record(),
        "model": picture.model,
        "model_hash": model_hash,
        "dtype": picture.dtype,
        "notes": list(picture.notes),
    }
    info.add_text(KEYWORD, json.dumps(record))
    return info


def parameters_text(picture: Picture, model_hash: str | None = None) -> str:
    """The prompt, the negative prompt and one line of settings, as AUTOMATIC1111's web UI writes and reads them."""
    request = picture.request
    settings: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "Schedule type": SCHEDULE_TITLES[request.schedule or SAMPLERS[request.sampler].schedule],
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{picture.image.width}x{picture.image.height}",
    }
    if model_hash is not None:
        settings["Model hash"] = model_hash[:10]
    if picture.model is not None:
        settings["Model"] = picture.model
    if request.image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.clip_skip is not None and request.clip_skip > 1:
        settings["Clip skip"] = request.clip_skip
    settings["RNG"] = "CPU"
    if request.eta is not None:
        settings["Eta"] = f"{request.eta:g}"
    settings["Version"] = f"ldm-{__version__}"
    lines = [request.prompt, f"Negative prompt: {request.negative}" if request.negative else ""]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(line for line in lines if line)


def _quoted(value: object) -> str:
    """A value as it stands, or as a JSON string where it holds what divides values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def read_metadata(path: str | Path) -> Metadata:
    """Read a PNG's text chunks back; a record that is not ours is left out. Raises `LdmError` where it is no PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # text may stand behind the pixels
            found = getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError) as error:
        raise LdmError(f"{path}: cannot be read as a PNG picture ({reason(error)})") from None
    return Metadata(parameters=found.get("parameters"), record=_record(found.get(KEYWORD)))


def _record(text: str | None) -> dict[str, Any] | None:
    try:
        record = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("request"), dict) else None

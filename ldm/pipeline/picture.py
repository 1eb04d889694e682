"""One picture, and the PNG file that says how it was made: AUTOMATIC1111's `parameters` text, and our request as JSON.

Other programs read the first, `ldm.pipeline.metadata` the second.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, PngImagePlugin

from ldm import __version__
from ldm.pipeline.adapters import AppliedAdapter
from ldm.pipeline.files import write_new
from ldm.pipeline.request import Control, GenerateRequest
from ldm.samplers import SAMPLERS

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
class OtherPart:
    """A part of a model that was taken from a file of its own. kind: "unet", "vae" or "text encoder"."""

    kind: str
    path: Path

    @property
    def name(self) -> str:
        """The file's name, or the folder's."""
        return self.path.name

    @cached_property
    def hash(self) -> str | None:
        """10 digits of the file's SHA-256, as other programs show them; None of a folder, or a file that is gone."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:10]
        except OSError:
            return None


@dataclass(frozen=True)
class Picture:
    """One picture and all that it takes to make it again.

    index:   its place in the request that was asked
    seed:    its own
    request: for this picture alone: its own seed, count 1, nothing left to a default
    model:   the model's name, None if it has none; dtype: of its U-Net
    notes:   what a reader should know, a line each
    seconds: its share of the time that denoising and decoding took
    adapters: those of the model
    embeddings: (name, SHA-256 of the file) of those that the prompts name
    parts: those of the model that are not its own file's
    """

    image: Image.Image
    index: int
    seed: int
    request: GenerateRequest
    model: str | None
    dtype: str
    notes: tuple[str, ...]
    seconds: float
    adapters: tuple[AppliedAdapter, ...] = ()
    embeddings: tuple[tuple[str, str], ...] = ()
    parts: tuple[OtherPart, ...] = ()

    def save(self, path: str | Path, *, model_hash: str | None = None) -> Path:
        """Write a PNG with all metadata at `path`, or at path-2, path-3 ... where that is taken. Returns the path.

        model_hash: the SHA-256 of the model's file, in hexadecimal. Raises `LdmError` where it cannot be written; then
        there is no file, and the picture is still in memory.
        """
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", pnginfo=png_text(self, model_hash))
        return write_new(Path(path), buffer.getvalue())


def png_text(picture: Picture, model_hash: str | None = None) -> PngImagePlugin.PngInfo:
    """Both text chunks of a picture. model_hash: the SHA-256 of the model's file, in hexadecimal."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters_text(picture, model_hash))
    record = {
        "version": __version__,
        "request": picture.request.record(),
        "model": picture.model,
        "model_hash": model_hash,
        "parts": [{"kind": part.kind, "name": part.name, "hash": part.hash} for part in picture.parts],
        "dtype": picture.dtype,
        "notes": list(picture.notes),
        "adapters": [asdict(adapter) for adapter in picture.adapters],
        "embeddings": [{"name": name, "hash": digest} for name, digest in picture.embeddings],
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
    if vae := next((part for part in picture.parts if part.kind == "vae"), None):
        settings |= {"VAE hash": vae.hash, "VAE": vae.name} if vae.hash else {"VAE": vae.name}
    if request.image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.clip_skip is not None and request.clip_skip > 1:
        settings["Clip skip"] = request.clip_skip
    for index, control in enumerate(request.controls):
        settings[f"ControlNet {index}"] = _control_text(control)
    settings["RNG"] = "CPU"
    if request.eta is not None:
        settings["Eta"] = f"{request.eta:g}"
    if picture.adapters:
        hashes = {re.sub("[:,]", "", adapter.name): adapter.hash for adapter in picture.adapters}
        settings["Lora hashes"] = ", ".join(f"{name}: {digits}" for name, digits in hashes.items())
    if picture.embeddings:
        named = (f"{re.sub('[:,]', '', name)}: {digest[:12]}" for name, digest in picture.embeddings)
        settings["TI hashes"] = ", ".join(named)
    settings["Version"] = f"ldm-{__version__}"
    lines = [request.prompt, f"Negative prompt: {request.negative}" if request.negative else ""]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(line for line in lines if line)


def _control_text(control: Control) -> str:
    """One ControlNet as the web UI's extension writes it."""
    mode = "ControlNet is more important" if control.guess else "Balanced"
    return (
        f"Module: {'canny' if control.canny else 'none'}, Model: {control.network}, Weight: {control.weight:g}, "
        f"Guidance Start: {control.start:g}, Guidance End: {control.end:g}, Control Mode: {mode}"
    )


def _quoted(value: object) -> str:
    """A value as it stands, or as a JSON string where it holds what divides values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text

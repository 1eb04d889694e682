"""One picture, and the file that says how it was made: AUTOMATIC1111's text, and our request as JSON.

Other programs read the first, `ldm.pipeline.metadata.read` the second.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image, PngImagePlugin

from ldm import __version__
from ldm.layers.in_bytes import Store
from ldm.pipeline.adapters import AppliedAdapter
from ldm.pipeline.files import sha256_of, write_new
from ldm.pipeline.metadata import infotext
from ldm.pipeline.metadata.exif import JPEG_LIMIT, KEYWORD, exif_bytes
from ldm.pipeline.names import SCHEDULE_TITLES, ScheduleName
from ldm.pipeline.request import GenerateRequest
from ldm.samplers import SAMPLERS


@dataclass(frozen=True)
class OtherPart:
    """A part of a model that has a file of its own. kind: "unet", "vae", "text encoder", "refiner" or
    "prior"."""

    kind: str
    path: Path

    @property
    def name(self) -> str:
        """The file's name, or the folder's."""
        return self.path.name

    @cached_property
    def hash(self) -> str | None:
        """10 digits of the file's SHA-256, as other programs show them; None of a folder, or a file that is gone."""
        digest = sha256_of(self.path)
        return None if digest is None else digest[:10]


@dataclass(frozen=True)
class Picture:
    """One picture and all that it takes to make it again.

    index:   its place in the request that was asked
    seed:    its own
    request: for this picture alone: its own seed, count 1, nothing left to a default
    model:   the model's name, None if it has none; dtype: of its U-Net
    notes:   what a reader should know, a line each
    seconds: its share of the time that denoising and decoding took
    batch:   its place among so many that were drawn at once; alone it may differ by rounding
    adapters: those of the model
    embeddings: (name, SHA-256 of the file) of those that the prompts name
    parts: those of the model that are not its own file's
    compiled: whether the networks' blocks were, which rounds otherwise
    store:    how the U-Net kept its weights
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
    batch: tuple[int, int] = (0, 1)
    compiled: bool = False
    store: Store = "full"

    def save(self, path: str | Path, *, model_hash: str | None = None) -> Path:
        """Write a picture with all metadata at `path`, or at path-2, path-3 ... where that is taken. Returns the path.

        The name's ending says which kind: .jpg, .jpeg and .webp are lossy, of quality 95 and with colours at full
        resolution; whatever else is a PNG, which alone keeps every pixel as it is. model_hash: the SHA-256 of the
        model's file, in hexadecimal. Raises `LdmError` where it cannot be written; then there is no file, and the
        picture is still in memory.
        """
        return write_new(Path(path), encoded(self, Path(path).suffix.lower(), model_hash))


def encoded(picture: Picture, suffix: str = ".png", model_hash: str | None = None) -> bytes:
    """A file's bytes, see `Picture.save`. A JPEG has no room for our JSON beside some thousand signs of other scripts;
    it is then left out, and AUTOMATIC1111's text stays."""
    text, record = parameters_text(picture, model_hash), record_of(picture, model_hash)
    buffer = io.BytesIO()
    if suffix in (".jpg", ".jpeg"):
        block = exif_bytes(text, json.dumps(record, ensure_ascii=False), limit=JPEG_LIMIT)
        picture.image.save(buffer, "JPEG", quality=95, subsampling="4:4:4", exif=block)
    elif suffix == ".webp":
        picture.image.save(buffer, "WEBP", quality=95, exif=exif_bytes(text, json.dumps(record, ensure_ascii=False)))
    else:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        info.add_text(KEYWORD, json.dumps(record))
        picture.image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def record_of(picture: Picture, model_hash: str | None = None) -> dict[str, Any]:
    """All that it takes to make the picture again, but for the files themselves."""
    return {
        "version": __version__,
        "request": picture.request.record(),
        "model": picture.model,
        "model_hash": model_hash,
        "parts": [{"kind": part.kind, "name": part.name, "hash": part.hash} for part in picture.parts],
        "dtype": picture.dtype,
        "compiled": picture.compiled,
        "store": picture.store,
        "batch": list(picture.batch),
        "notes": list(picture.notes),
        "adapters": [asdict(adapter) for adapter in picture.adapters],
        "embeddings": [{"name": name, "hash": digest} for name, digest in picture.embeddings],
    }


def parameters_text(picture: Picture, model_hash: str | None = None) -> str:
    """The prompt, the negative prompt and one line of settings, as AUTOMATIC1111's web UI writes and reads them."""
    request = picture.request
    schedule = request.schedule or SAMPLERS[request.sampler].schedule
    settings: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "Schedule type": SCHEDULE_TITLES[cast("ScheduleName", schedule)],
        "CFG scale": infotext.number(request.guidance),
        "Seed": request.seed,
        "Size": f"{request.width or picture.image.width}x{request.height or picture.image.height}",
    }
    if model_hash is not None:
        settings["Model hash"] = model_hash[:10]
    if picture.model is not None:
        settings["Model"] = picture.model
    if vae := next((part for part in picture.parts if part.kind == "vae"), None):
        settings |= {"VAE hash": vae.hash, "VAE": vae.name} if vae.hash else {"VAE": vae.name}
    settings |= infotext.settings_of(request)
    if refiner := next((part for part in picture.parts if part.kind == "refiner"), None):
        settings["Refiner"] = f"{refiner.path.stem} [{refiner.hash}]" if refiner.hash else refiner.path.stem
    if prior := next((part for part in picture.parts if part.kind == "prior"), None):
        settings["Prior"] = f"{prior.path.stem} [{prior.hash}]" if prior.hash else prior.path.stem
    if picture.adapters:
        hashes = {re.sub("[:,]", "", adapter.name): adapter.hash for adapter in picture.adapters}
        settings["Lora hashes"] = ", ".join(f"{name}: {digits}" for name, digits in hashes.items())
    if picture.embeddings:
        named = (f"{re.sub('[:,]', '', name)}: {digest[:12]}" for name, digest in picture.embeddings)
        settings["TI hashes"] = ", ".join(named)
    settings["Version"] = f"{infotext.OURS}{__version__}"
    return infotext.write(request.prompt, request.negative, settings)

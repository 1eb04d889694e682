"""What a picture's file says about how it was made, read back; `ldm.pipeline.picture` writes it.

Reading never loads a model or opens a path that metadata names. Nothing here imports torch.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm.errors import LdmError
from ldm.pipeline.files import read_file, reason
from ldm.pipeline.images import DAMAGED, what_is
from ldm.pipeline.metadata import comfy_graph, infotext, infotext_fields
from ldm.pipeline.metadata.exif import KEYWORD, read_exif
from ldm.pipeline.metadata.remake import PICTURES, Remake
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.validation import shown

MAX_FILE = 64 * 2**20
MAX_PIXELS = 64 * 2**20
MAX_TEXT = 2**20
"""Characters of a text. The longest that we write have some 50,000; a large ComfyUI graph has 300,000."""
MAX_DEPTH = 64
"""Of objects and lists inside each other, in any JSON."""

NOT_READ = {
    "invokeai_metadata": "InvokeAI", "invokeai_graph": "InvokeAI", "sd-metadata": "InvokeAI", "Dream": "InvokeAI",
    "sui_image_params": "SwarmUI", "fooocus_scheme": "Fooocus",
}  # fmt: skip
"""Text chunks of programs whose metadata is named, and not read."""


@dataclass(frozen=True)
class Metadata:
    """What was read from a picture; each None where there is none.

    format:     "PNG", "JPEG" or "WEBP"; size: (width, height) in pixels
    parameters: AUTOMATIC1111's text
    record:     ours: {"version", "request", "model", "model_hash", "parts", "dtype", "compiled", "store", "batch",
                "notes", "adapters", "embeddings"}; its request as `GenerateRequest.record`. All but `request` may hold
                anything
    graph:      ComfyUI's
    notes:      a line for each thing that was found and not read
    """

    format: str
    size: tuple[int, int]
    parameters: str | None = None
    record: dict[str, Any] | None = None
    graph: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def request(self) -> GenerateRequest | None:
        """The request to make the picture again, if ours is there and needs no other picture.

        Raises `LdmError` where it is not one of this version.
        """
        if self.record is None:
            return None
        remake = _of_record(self.record)
        if remake.misses:
            raise LdmError(f"ldm: {remake.misses[0]}; expected a request as this version writes it")
        return None if remake.pictures or remake.controls else remake.request()

    def remake(self) -> Remake | None:
        """What it takes to make the picture again, by the best of what was found: ours, a graph, a text."""
        if self.record is not None:
            return _of_record(self.record)
        if self.graph is not None and (remake := comfy_graph.read_graph(self.graph)) is not None:
            return remake
        text = None if self.parameters is None else infotext.parse(self.parameters)
        return infotext_fields.remake_of(text) if text is not None and text.settings else None


def read_metadata(path: str | Path) -> Metadata:
    """What a PNG, JPEG or WebP file says, by its content; EXIF goes before a PNG's text chunks, as elsewhere.

    What is too long, too deep or of another kind is left out, with a note. Raises `LdmError` where the file is no such
    picture, is damaged, or is above 64 MiB or 64 Mpx.
    """
    data = read_file(Path(path), MAX_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of broken EXIF, which is left out, and of size: ours is lower
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise LdmError(f"{path}: found {image.width}x{image.height} pixels, expected at most {MAX_PIXELS}")
            image.load()  # text may stand behind the pixels
            texts = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
            texts |= read_exif(image)
            kind, size = image.format or "", image.size
    except UnidentifiedImageError:
        raise LdmError(f"{path}: found {what_is(data)}, expected a PNG, JPEG or WebP picture") from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise LdmError(f"{path}: cannot be read as a PNG, JPEG or WebP picture ({reason(error)})") from None
    return _metadata(kind, size, texts)


def _metadata(kind: str, size: tuple[int, int], texts: dict[str, str]) -> Metadata:
    notes = [f"{name}: {len(text)} characters, too long to be read" for name, text in texts.items() if _long(text)]
    texts = {name: text for name, text in texts.items() if not _long(text)}
    notes += sorted({f"{program} metadata: found, not read" for name, program in NOT_READ.items() if name in texts})
    if texts.get("Software") == "NovelAI":
        notes.append("NovelAI metadata: found, not read")
    record, graph = _object(texts, KEYWORD, notes), _object(texts, "prompt", notes)
    if record is not None and not isinstance(record.get("request"), dict):
        record = None
        notes.append("ldm: holds no request; left out")
    if graph is None and "workflow" in texts:
        notes.append("ComfyUI workflow: found without its graph, not read")
    parameters = texts.get("parameters")
    if parameters is not None and parameters.lstrip().startswith("{"):
        parameters = None
        notes.append("parameters: JSON of another program, not read")
    if record is None and parameters is not None and f"Version: {infotext.OURS}" in parameters:
        notes.append("ldm: the record is not there, removed or too long for a JPEG; what only it knows is lost")
    return Metadata(kind, size, parameters, record, graph, tuple(notes))


def _long(text: str) -> bool:
    return len(text) > MAX_TEXT


def _object(texts: dict[str, str], name: str, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object; NaN, which ComfyUI writes, becomes null, as does what is too large for a number."""
    if name not in texts:
        return None
    try:
        found = json.loads(texts[name], parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or _depth(found) > MAX_DEPTH:
        notes.append(f"{name}: no JSON object that can be read; left out")
        return None
    return found


def _finite(digits: str) -> float | None:
    return number if math.isfinite(number := float(digits)) else None


def _depth(value: Any) -> int:
    """How deep objects and lists lie inside each other, counted level by level."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _of_record(record: dict[str, Any]) -> Remake:
    """Our own record. It may be of another version, or made up: what is no field is told and left out."""
    asked = dict(record["request"])
    pictures = {name: _text(asked.pop(f"{name}_sha256")) for name in PICTURES if f"{name}_sha256" in asked}
    controls = asked.pop("controls", None)
    controls = tuple(control for control in controls if isinstance(control, dict)) if isinstance(controls, list) else ()
    known = {name: value for name, value in asked.items() if name in GenerateRequest.model_fields}
    known = {name: value for name, value in known.items() if name not in PICTURES or value is None}
    left = [name for name in asked if name not in known]
    return Remake(
        source=f"ldm {_text(record.get('version')) or ''}".rstrip(),
        fields=known,
        pictures=pictures,
        controls=controls,
        model=_text(record.get("model")),
        model_hash=_text(record.get("model_hash")),
        misses=(f"not known here and left out: {', '.join(map(shown, left[:20]))}",) if left else (),
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

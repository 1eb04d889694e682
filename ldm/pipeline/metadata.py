"""What a picture's file says about how it was made, read back; `ldm.pipeline.picture` writes it.

Reading never loads a model or opens a path that metadata names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline.files import reason
from ldm.pipeline.images import DAMAGED
from ldm.pipeline.picture import KEYWORD
from ldm.pipeline.request import GenerateRequest


@dataclass(frozen=True)
class Metadata:
    """What was read from a picture: other programs' text, and our record, each None where there is none.

    record: {"version", "request", "model", "model_hash", "parts", "dtype", "notes", "adapters", "embeddings"}; its
    request as `GenerateRequest.record`.
    """

    parameters: str | None
    record: dict[str, Any] | None

    def request(self) -> GenerateRequest | None:
        """The request to make the picture again, if ours is there and needs no other picture."""
        if self.record is None or "image_sha256" in self.record["request"] or self.record["request"].get("controls"):
            return None
        return GenerateRequest(**self.record["request"])


def read_metadata(path: str | Path) -> Metadata:
    """Read a PNG's text chunks back; a record that is not ours is left out. Raises `LdmError` where it is no PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # text may stand behind the pixels
            found = getattr(image, "text", {})
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise LdmError(f"{path}: cannot be read as a PNG picture ({reason(error)})") from None
    return Metadata(parameters=found.get("parameters"), record=_record(found.get(KEYWORD)))


def _record(text: str | None) -> dict[str, Any] | None:
    try:
        record = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("request"), dict) else None

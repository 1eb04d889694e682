"""Captions in files: a text file's lines, or a JSON object's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldm.data.file_at import FileAt
from ldm.errors import LdmError

CAPTION_COLUMNS = ("text", "caption", "prompt", "texts", "captions")
"""Where a row or a JSON object may hold a caption, or a list of them."""

MAX_BYTES = 2**20


def read_captions(suffix: str, file: FileAt, *, lines: bool) -> tuple[str, ...]:
    """The captions of a file; none in an empty one. lines: each line of a text is one; else only the first line is.

    Raises LdmError for what is no text in UTF-8, or no JSON.
    """
    try:
        text = file.read(MAX_BYTES).decode("utf-8-sig")
        if suffix == ".json":
            values = json.loads(text)
            return captions_in(values) if isinstance(values, dict) else ()
    except UnicodeDecodeError:
        raise LdmError(f"its caption ({suffix}) is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError):
        raise LdmError(f"its caption ({suffix}) is not JSON; mend it") from None
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    return found if lines else found[:1]


def captions_in(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of a row or of a JSON object: those of the first of CAPTION_COLUMNS that holds any."""
    for column in CAPTION_COLUMNS:
        held = values.get(column)
        texts = held if isinstance(held, list) else [held]
        if captions := tuple(text.strip() for text in texts if isinstance(text, str) and text.strip()):
            return captions
    return ()

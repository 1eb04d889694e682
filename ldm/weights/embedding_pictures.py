"""Embeddings that AUTOMATIC1111's web UI hides in a picture, as JSON: in a PNG's text, or in its pixels.

The text chunk `sd-ti-embedding` is JSON in base64. In the pixels the picture proper stands between two black columns;
left of them and right of them every byte of a colour carries half a byte of zlib-compressed JSON in its lower four
bits, scrambled by a generator that always starts alike (the upper four are decoration). A tensor is
{"TORCHTENSOR": nested lists}.
"""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import open_regular, printable

PICTURES = (".png", ".webp")
CHUNK = "sd-ti-embedding"
MAX_PIXELS = 4096 * 4096
MAX_BLOCK = 4 * 1024**2
MAX_JSON = 16 * 1024**2
"""At most so many pixels, half bytes on one side, and bytes of JSON are read."""


def read_embedding_picture(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a picture, named as in the .pt file ("string_to_param.*"), and the words beside them.

    Raises LdmError where there are none.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are read")
            image.load()
            text = getattr(image, "text", {}).get(CHUNK)
            raw = base64.b64decode(text) if text else _from_pixels(np.asarray(image.convert("RGB")))
        return _entries(json.loads(raw))
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, OSError, SyntaxError, zlib.error,
            Image.DecompressionBombError) as error:  # fmt: skip
        message = (
            f"holds no embedding that can be read ({printable(str(error))[:200]}); use the .pt or .safetensors file"
        )
        raise LdmError(f"{printable(str(path))}: {message}") from None


def _entries(data: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The JSON's tensors as {"string_to_param.*": ...}, and the words beside them. Raises ValueError."""
    trained = data.get("string_to_param") if isinstance(data, dict) else None
    if not isinstance(trained, dict):
        raise ValueError("no string_to_param")
    if not all(isinstance(value, dict) and "TORCHTENSOR" in value for value in trained.values()):
        raise ValueError("string_to_param without a TORCHTENSOR")
    tensors = {
        f"string_to_param.{name}": torch.tensor(value["TORCHTENSOR"], dtype=torch.float32)
        for name, value in trained.items()
    }
    return tensors, {name: str(value) for name, value in data.items() if isinstance(value, str | int)}


def _from_pixels(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> JSON. Raises ValueError where no two black columns part the picture, zlib.error ..."""
    bright: np.ndarray = pixels.max(axis=2) > 0
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not len(rows):
        raise ValueError("all black")
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    dark = np.flatnonzero(~nibbles.any(axis=(0, 2)))
    if len(dark) < 2:
        raise ValueError("no text chunk, and no data in its pixels")
    low, high = (_unscrambled(part) for part in (nibbles[:, : dark[0]], nibbles[:, dark[-1] + 1 :]))
    inflate = zlib.decompressobj()  # what follows the stream's end is filling
    raw = inflate.decompress((high << 4 | low).tobytes(), MAX_JSON)
    if not inflate.eof:
        raise ValueError("its data is cut short or too long")
    return raw


def _unscrambled(block: np.ndarray) -> np.ndarray:
    if block.size > MAX_BLOCK:
        raise ValueError("no text chunk, and too much data in its pixels")
    mask = np.fromiter(itertools.islice(_generator(), block.size), dtype=np.uint8, count=block.size)
    return block.reshape(-1) ^ mask


def _generator() -> Iterator[int]:
    """The lower four bits of a linear congruential generator's states modulo 255, from state 0."""
    state = 0
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield state % 255 & 15

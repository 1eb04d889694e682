"""Every picture of a set decoded once: whether it can be, its size and shape, and what is particular about it.

How a picture is decoded is the caller's to say, so that a set is checked by what training reads.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ldm.data.buckets import Size
from ldm.data.example import Example, PictureSet
from ldm.data.file_at import BytesAt
from ldm.data.picture_set import nothing_left
from ldm.errors import LdmError

MAX_BYTES = 128 * 2**20
HASH_SIDE, COLOR_SIDE = 8, 6
NOISE = 2
"""Levels of grey by which neighbours may differ and count as the same: a JPEG's noise on a plain ground."""

_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
_SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))
"""How a profile calls itself that changes nothing."""
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError)

Decode = Callable[[bytes], Image.Image]
"""A file's bytes -> an upright RGB picture; LdmError where that cannot be."""


@dataclass(frozen=True)
class Look:
    """What was seen of a picture.

    size: upright, before anything else is done to it
    digest: SHA-256 of the file's bytes
    shape: a difference hash, 64 bits: whether each of HASH_SIDE^2 spots is lighter than the one to its right
    colors: of COLOR_SIDE^2 fields, row by row the red, green and blue of each, 0 to 255
    remarks: what is particular, and how it is read
    """

    size: Size
    digest: str
    shape: int
    colors: tuple[int, ...]
    remarks: tuple[str, ...]


def look_at(file: BytesAt, decode: Decode) -> tuple[Look, Image.Image]:
    """A picture's look, and the picture. Raises LdmError where it cannot be read."""
    data = file.read(MAX_BYTES)
    picture = decode(data)
    colors = np.asarray(picture.resize((COLOR_SIDE, COLOR_SIDE), Image.Resampling.BOX)).flatten().tolist()
    digest = hashlib.sha256(data).hexdigest()
    return Look(upright_size(data), digest, _shape(picture), tuple(colors), _remarks(data)), picture


def examine(
    pictures: PictureSet,
    decode: Decode,
    seen: Callable[[int, Example, Look, Image.Image], None] | None = None,
) -> tuple[PictureSet, tuple[Look, ...]]:
    """The set without what cannot be decoded, which is named, and what was seen of each picture that is left.

    seen: told each picture as it comes, with its number among the set's examples

    Raises LdmError where none is left.
    """
    kept: list[Example] = []
    looks: list[Look] = []
    left_out = list(pictures.left_out)
    for number, example in enumerate(pictures.examples):
        try:
            look, picture = look_at(example.image, decode)
            for what, helper in (("mask", example.mask), ("condition", example.hint)):
                _check_helper(what, helper, look.size, decode)
        except LdmError as error:
            left_out.append(f"{example.name}: {str(error).removeprefix('image: ')}")
            continue
        kept.append(example)
        looks.append(look)
        if seen is not None:
            seen(number, example, look, picture)
    left = replace(pictures, examples=tuple(kept), left_out=tuple(left_out))
    if all(example.regular for example in kept):
        raise nothing_left(left)
    return left, tuple(looks)


def _check_helper(what: str, file: BytesAt | None, size: Size, decode: Decode) -> None:
    """Raise LdmError where a mask or hint cannot be read, or is of another shape than its picture."""
    if file is None:
        return
    try:
        data = file.read(MAX_BYTES)
        decode(data)
        width, height = upright_size(data)
    except LdmError as error:
        raise LdmError(f"its {what}: {str(error).removeprefix('image: ')}") from None
    if abs(width / height / (size[0] / size[1]) - 1) > 0.02:
        raise LdmError(f"its {what} is {width}x{height}, expected the shape of the picture, {size[0]}x{size[1]}")


def upright_size(data: bytes) -> Size:
    """(width, height) of a picture as its EXIF turns it, from the head of its file. Raises LdmError for no picture."""
    picture, turn = _opened(data)
    width, height = picture.size
    return (height, width) if turn in _ON_ITS_SIDE else (width, height)


def _opened(data: bytes) -> tuple[Image.Image, int]:
    """A picture that is not decoded yet, and its EXIF orientation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        return picture, picture.getexif().get(_ORIENTATION, 1)
    except _DAMAGED as error:
        raise LdmError(f"found a header that cannot be read ({type(error).__name__}); save the picture again") from None


def _remarks(data: bytes) -> tuple[str, ...]:
    picture, turn = _opened(data)
    remarks = []
    if picture.mode.startswith("CMYK"):
        remarks.append("CMYK, for print: turned into RGB")
    if picture.mode.startswith("I"):
        remarks.append("16 bit: read with 8")
    if getattr(picture, "is_animated", False):
        remarks.append(f"animated: the first of {getattr(picture, 'n_frames', 2)} frames is read")
    if picture.has_transparency_data:
        remarks.append("transparent: laid over white")
    if (profile := picture.info.get("icc_profile")) and not any(name in profile for name in _SRGB):
        remarks.append("has a color profile: turned into sRGB")
    if turn in range(2, 9):
        remarks.append("turned as its EXIF says")
    return tuple(remarks)


def _shape(picture: Image.Image) -> int:
    small = picture.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BILINEAR)
    grey = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] - grey[:, 1:] > NOISE).tobytes(), "big")

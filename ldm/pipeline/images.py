"""Pictures as files, as PIL images and as tensors.

Tensors are (3, H, W) float32 in [-1, 1], colours sRGB: a file in other colours says so by its profile.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ldm.errors import LdmError
from ldm.pipeline.files import read_file

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 16 * 2**20
LARGE_BYTES, LARGE_PIXELS = 128 * 2**20, 170 * 2**20
"""The limits of what is shrunk at once, as for CLIP. Pillow's own is at 171 Mpx."""
SHRUNK_SIDE = 1024
_FORMATS = ("PNG", "JPEG", "WEBP")

DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)
"""What Pillow raises for a file that is cut or broken somewhere."""


def read_picture(data: bytes) -> Image.Image:
    """A PNG, JPEG or WebP file's bytes -> an upright RGB image; of an animation the first frame.

    The format is told by the content. EXIF orientation is applied, an embedded profile's colours are turned into sRGB,
    transparency is laid over white. Raises `LdmError` for anything else, for a truncated file, and above 20 MiB or
    16 Mpx.
    """
    return _read(data, _colored)


def read_shrunk(data: bytes, side: int = SHRUNK_SIDE) -> Image.Image:
    """The same for who looks at little of a picture, up to 128 MiB or 170 Mpx.

    Above 16 Mpx it comes smaller by a whole factor, its shorter side still `side` or 1024 pixels, the larger, or more.
    """
    return _read(data, _colored, max(side, SHRUNK_SIDE))


def read_mask(data: bytes) -> Image.Image:
    """The same for a mask -> an upright image of mode L; see `as_mask`."""
    return _read(data, as_mask)


def as_mask(image: Image.Image) -> Image.Image:
    """Any image -> its luminance, mode L, 255 is redrawn; what is transparent was not painted on, and is kept."""
    return _flat(image, "black").convert("L")


def read_levels(data: bytes) -> Image.Image:
    """The same for a depth map of 8 or 16 bit -> an upright image of mode F, 0 black ... 65535 white."""
    return _read(data, _levels)


def _levels(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return image.convert("I").convert("F")
    return as_mask(image).convert("F").point(lambda level: level * 257)


def _read(data: bytes, flat: Callable[[Image.Image], Image.Image], side: int | None = None) -> Image.Image:
    """side: of a large picture so much of the shorter side is enough; None: there must be none."""
    most_bytes, most = (MAX_BYTES, MAX_PIXELS) if side is None else (LARGE_BYTES, LARGE_PIXELS)
    if not data:
        raise LdmError("image: found an empty file, expected a PNG, JPEG or WebP picture")
    if len(data) > most_bytes:
        raise LdmError(f"image: found more than {most_bytes // 2**20} MiB, expected a smaller file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise LdmError(f"image: found far more than {most} pixels, expected at most that; scale it down") from None
    except DAMAGED:
        raise LdmError(f"image: found {what_is(data)}, expected a PNG, JPEG or WebP picture") from None
    width, height = image.size
    if width * height > most:
        raise LdmError(f"image: found {width}x{height}, expected at most {most} pixels; scale it down")
    try:
        if side is not None and width * height > MAX_PIXELS:
            image = _shrunk(image, side)
        image.load()
        return flat(ImageOps.exif_transpose(image))
    except DAMAGED:
        raise LdmError("image: found a truncated or damaged picture; get the file again") from None


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """A picture that is not decoded yet, smaller by a whole factor. A JPEG is never decoded at more than twice that."""
    image.draft(None, (side, side))
    if image.mode not in ("L", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        image = _flat(ImageOps.exif_transpose(image))
    return image.reduce(max(1, min(image.size) // side))


def picture_bytes(image: bytes | str | Path | Image.Image) -> bytes:
    """A file's bytes as they are, a path's content, or a PIL image as PNG.

    Raises `LdmError` for a path that cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        (image if image.mode == "I;16" else _flat(image)).save(buffer, "PNG")
        return buffer.getvalue()
    return read_file(Path(image), MAX_BYTES)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover width x height and cut what stands out, equally on both sides; nothing is distorted."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def shape_like(size: tuple[int, int], side: int, multiple: int = 8) -> tuple[int, int]:
    """The (width, height) with the aspect of `size` and about side^2 pixels, multiples of 8 from 64 to 2048."""
    scale = side / (size[0] * size[1]) ** 0.5
    width, height = (min(2048, max(64, multiple * round(edge * scale / multiple))) for edge in size)
    return width, height


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> (3, H, W) float32 in [-1, 1]."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) -> an RGB image; values beyond [-1, 1] are cut. The tensor must be finite."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def _flat(image: Image.Image, ground: str = "white") -> Image.Image:
    """Any mode -> RGB. 16-bit grey is scaled down (Pillow alone would cut it), transparency is laid over the ground."""
    if image.mode.startswith("I"):
        return image.point(lambda level: level / 257).convert("L").convert("RGB")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, ground), above).convert("RGB")
    return image.convert("RGB")


def _colored(image: Image.Image) -> Image.Image:
    """Any mode, and the colours of any profile -> RGB, in sRGB. A profile that cannot be read counts as none."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode in ("I", "I;16", "LA"):
        return _flat(image)
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).lower().startswith("srgb"):
            return _flat(image)
        if image.mode == "P" or image.has_transparency_data:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        mode = image.mode if image.mode == "RGBA" else "RGB"
        turned = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return _flat(image)
    return _flat(image if turned is None else turned)


def what_is(data: bytes) -> str:
    """What a file that is no PNG, JPEG or WebP picture seems to be; "an empty file" and the like."""
    start = data[:256].lstrip().lower()
    if not data:
        return "an empty file"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML file"
    if start.startswith(b"gif8"):
        return "a GIF"
    if start.startswith(b"%pdf"):
        return "a PDF"
    if data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF")):
        return "a truncated or damaged picture"
    return "another kind of file"

"""Pictures in: only what is meant, upright, opaque and whole."""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline import images
from ldm.pipeline.images import (
    LARGE_PIXELS,
    MAX_BYTES,
    fit,
    picture_bytes,
    read_picture,
    read_shrunk,
    shape_like,
    to_image,
    to_tensor,
)

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_read_by_content(kind):
    picture = read_picture(encoded(noise(), kind))
    assert picture.mode == "RGB" and picture.size == (48, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # What a viewer shows for each orientation, by the TIFF standard: where rows and columns of the file go.
    upright = {
        1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.transpose(1, 0, 2),
        6: np.rot90(CORNERS, -1), 7: CORNERS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(CORNERS),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(encoded(Image.fromarray(CORNERS), exif=exif))
    assert np.array_equal(np.asarray(picture), upright)


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 128))
    pixels = np.asarray(read_picture(encoded(half)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 1].astype(int) - 127).max() <= 1
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert np.asarray(read_picture(encoded(palette, transparency=0)))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(read_picture(encoded(palette)))[0, 0].tolist() == [10, 20, 30]


def test_16_bit_grey_is_scaled():
    levels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    pixels = np.asarray(read_picture(encoded(Image.fromarray(levels))))
    assert pixels[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(read_picture(data))[0, 0].tolist() == [255, 0, 0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


WHOLE = encoded(noise())
BAD = {
    "empty": (b"", "empty file"),
    "one byte": (b"\x89", "another kind of file"),
    "html": (b"\n <!DOCTYPE html><html>", "a web page"),
    "svg": (b"<svg onload='alert(1)'/>", "an SVG or XML file"),
    "pdf": (b"%PDF-1.7", "a PDF"),
    "gif": (encoded(noise(), "GIF"), "a GIF"),
    "tiff": (encoded(noise(), "TIFF"), "another kind of file"),
    "bmp": (encoded(noise(), "BMP"), "another kind of file"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "another kind of file"),
    "cut png": (WHOLE[: len(WHOLE) // 2], "truncated or damaged"),
    "cut png header": (WHOLE[:20], "truncated or damaged"),
    "cut jpeg": (encoded(noise(), "JPEG")[:-200], "truncated or damaged"),
    "cut webp": (encoded(noise(), "WEBP")[:-200], "truncated or damaged"),
    "bad crc": (WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:], "truncated or damaged"),
    "short eXIf": (WHOLE[:33] + chunk(b"eXIf", b"II*\0") + WHOLE[33:], "truncated or damaged"),
    "empty iCCP": (WHOLE[:33] + chunk(b"iCCP", b"") + WHOLE[33:], "truncated or damaged"),
    "empty iCCP at the end": (WHOLE[:-12] + chunk(b"iCCP", b"") + WHOLE[-12:], "truncated or damaged"),
    "huge header": (png_header(20_000, 20_000), "found far more than 16777216 pixels"),
    "large header": (png_header(10_000, 10_000), "found 10000x10000, expected at most 16777216 pixels"),
    "no pixels": (png_header(0, 0), "truncated or damaged"),
    "many bytes": (bytes(MAX_BYTES + 1), "found more than 20 MiB"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_refused(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LdmError, match=f"^image: .*({message})") as caught:
            read_picture(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "CMYK", "turned", "palette", "transparent", "grey"])
def test_a_large_picture_is_shrunk_where_that_is_enough(kind, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 2**22)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 16, 3), dtype=np.uint8))
    options: dict[str, object] = {}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x112] = 6
    if kind == "CMYK":
        coarse = coarse.convert("CMYK")
    if kind == "grey":
        coarse = coarse.convert("L")
    if kind == "transparent":
        coarse.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (13, 16), dtype=np.uint8)))
    if kind == "palette":
        coarse = coarse.quantize(8)
        options["transparency"] = 3
    name = "WEBP" if kind == "WEBP" else "JPEG" if kind in ("JPEG", "CMYK", "turned") else "PNG"
    data = encoded(coarse.resize((2560, 2080), Image.Resampling.NEAREST), name, quality=95, **options)
    with pytest.raises(LdmError, match="found 2560x2080, expected at most 4194304 pixels"):
        read_picture(data)
    expected = read_picture(encoded(coarse, **options)) if name == "PNG" else coarse.convert("RGB")
    if kind == "turned":
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    found = read_shrunk(data)
    assert found.mode == "RGB" and found.size == ((1040, 1280) if kind == "turned" else (1280, 1040))
    back = np.asarray(found.resize(expected.size, Image.Resampling.BOX), int)
    assert np.abs(back - np.asarray(expected, int)).max() <= (20 if name == "JPEG" else 3 if kind != "WEBP" else 30)


def test_what_is_not_too_large_is_not_shrunk():
    assert np.array_equal(np.asarray(read_shrunk(encoded(noise()))), np.asarray(read_picture(encoded(noise()))))
    side = int(LARGE_PIXELS**0.5) + 1
    with pytest.raises(LdmError, match=f"found {side}x{side}, expected at most {LARGE_PIXELS} pixels; scale it down"):
        read_shrunk(png_header(side, side))


def test_fit_covers_and_does_not_distort():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("black", (100, 0, 200, 100))
    assert np.asarray(fit(wide, 64, 64)).max() < 20  # the middle third is all that is left
    assert fit(wide, 64, 128).size == (64, 128)


@pytest.mark.parametrize(
    ("size", "side", "shape"),
    [((100, 100), 128, (128, 128)), ((400, 200), 128, (184, 88)), ((1, 65535), 128, (64, 2048)), ((9, 9), 8, (64, 64))],
)
def test_shape_like(size, side, shape):
    assert shape_like(size, side) == shape


def test_tensor_round_trip():
    picture = noise()
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 40, 48) and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(picture))
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 51)))[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert np.asarray(to_image(torch.tensor([-3.0, 3.0, 0.0]).reshape(3, 1, 1)))[0, 0].tolist() == [0, 255, 128]


def test_picture_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE)
    assert picture_bytes(path) == picture_bytes(str(path)) == picture_bytes(WHOLE) == WHOLE
    assert np.array_equal(np.asarray(read_picture(picture_bytes(noise()))), np.asarray(noise()))
    with pytest.raises(LdmError, match=r"nothing.png: cannot be read \(no such file or directory\)"):
        picture_bytes(tmp_path / "nothing.png")

"""Colour profiles: a picture looks as its file says."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.pipeline.images import read_mask, read_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = (
    SRGB.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    .replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
)  # fmt: skip
"""sRGB, but what it calls red is blue, and the other way round."""

PIXELS = np.array([[[250, 20, 40], [10, 200, 90]], [[0, 0, 0], [255, 255, 255]]], np.uint8)


def read(image: Image.Image, profile: bytes, format_: str = "PNG") -> np.ndarray:
    stream = io.BytesIO()
    image.save(stream, format_, icc_profile=profile, **({"quality": 100} if format_ == "JPEG" else {}))
    return np.asarray(read_picture(stream.getvalue())).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_followed(mode: str):
    image = Image.fromarray(PIXELS)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    assert np.abs(read(image, SWAPPED) - PIXELS[..., ::-1]).max() <= 2


def test_transparency_goes_over_white_afterwards():
    image = Image.fromarray(PIXELS).convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255], [255, 128]], np.uint8)))
    found = read(image, SWAPPED)
    assert found[0, 0].tolist() == [255, 255, 255] and np.abs(found[0, 1] - [90, 200, 10]).max() <= 2


@pytest.mark.parametrize("profile", [SRGB, b"no profile at all", SWAPPED[:200]])
def test_what_says_nothing_changes_nothing(profile: bytes):
    assert (read(Image.fromarray(PIXELS), profile) == PIXELS).all()


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK"])
def test_a_profile_of_other_channels_than_the_picture_has_changes_nothing(mode: str):
    image = Image.fromarray(PIXELS).convert(mode)
    format_ = "JPEG" if mode == "CMYK" else "PNG"
    assert (read(image, SWAPPED, format_) == read(image, b"", format_)).all()


def test_masks_have_no_colors():
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", icc_profile=SWAPPED)
    assert (np.asarray(read_mask(stream.getvalue())) == np.asarray(Image.fromarray(PIXELS).convert("L"))).all()

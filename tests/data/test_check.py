"""What `ldm.data` says of pictures that are broken, strange, double, small or long."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.data.buckets import Buckets, usual_buckets
from ldm.data.captions import CaptionRules
from ldm.data.check import Checked, check
from ldm.data.example import Defaults
from ldm.data.look import examine
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError
from ldm.pipeline.images import read_shrunk

CAPTIONED = Defaults(class_tokens="a thing")
SIZE_64 = Buckets(64, 32, 128, 16)


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Blobs unlike those of any other seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def checked(folder: Path, files: dict[str, bytes], defaults: Defaults = CAPTIONED, **how) -> Checked:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return check(*examine(read_pictures(folder, defaults), read_shrunk), **{"buckets": SIZE_64, **how})


def test_a_hundred_with_some_broken(tmp_path: Path):
    """Skipped, named, and the counts add up."""
    whole = encoded(noise(0), "JPEG")
    files = {f"{number:03}.jpg": encoded(noise(number), "JPEG") for number in range(94)}
    broken = {
        "094.jpg": (whole[: len(whole) // 2], "truncated"), "095.jpg": (b"", "empty file"),
        "097.jpg": (b"MZ", "another"),
        "096.jpg": (b"<!doctype html><p>404", "web page"), "098.png": (encoded(noise(1))[:60], "truncated"),
        "._099.jpg": (b"\0\5\x16\7", "macOS"),
    }  # fmt: skip
    found = checked(tmp_path, files | {name: data for name, (data, _) in broken.items()})
    assert len(found.pictures) == 94 and len(found.left_out) == 6 and not found.alike and not found.duplicates
    for name, (_, why) in broken.items():
        (line,) = [line for line in found.left_out if line.startswith(f"{name}: ")]
        assert why in line


def test_all_broken(tmp_path: Path):
    with pytest.raises(
        LdmError, match=r"holds no picture that can be used; 2 left out, as a\.png: found an empty file"
    ):
        checked(tmp_path, {"a.png": b"", "b.png": b"x"})


def test_strange_kinds(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6
    ramp = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    clear = noise(4).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((64, 64)))
    found = checked(
        tmp_path,
        {
            "animated.webp": encoded(noise(1), "WEBP", save_all=True, append_images=[noise(2)]),
            "clear.png": encoded(clear),
            "deep.png": encoded(ramp),
            "mapped.png": encoded(noise(7).quantize(16)),
            "print.jpg": encoded(noise(5).convert("CMYK"), "JPEG"),
            "turned.jpg": encoded(noise(6, 96, 48), "JPEG", exif=turned),
        },
    )
    assert not found.left_out and {seen.name: seen.remarks for seen in found.pictures} == {
        "animated.webp": ("animated: the first of 2 frames is read",),
        "clear.png": ("transparent: laid over white",),
        "deep.png": ("16 bit: read with 8",),
        "mapped.png": (),
        "print.jpg": ("CMYK, for print: turned into RGB",),
        "turned.jpg": ("turned as its EXIF says",),
    }
    assert found.pictures[-1].crop.original == (48, 96) and found.pictures[-1].crop.bucket == (48, 80)


def test_sizes(tmp_path: Path):
    """One pixel, a panorama, and one of more pixels than are ever decoded whole."""
    found = checked(
        tmp_path,
        {
            "dot.png": encoded(noise(1, 1, 1)),
            "pano.png": encoded(noise(2, 1800, 60)),
            "plain.png": encoded(noise(3)),
            "vast.png": encoded(Image.new("L", (6000, 4000), 9)),
        },
    )
    assert {seen.name: seen.faults for seen in found.pictures} == {
        "dot.png": ("tiny: enlarged 64 times",),
        "pano.png": ("wide, 30 to 1: 13% of it is kept",),
        "plain.png": (),
        "vast.png": (),
    }
    assert (found.tiny, found.long) == (("dot.png",), ("pano.png",))
    assert found.pictures[-1].crop.original == (6000, 4000)
    assert [(b.width, b.height, b.pictures) for b in found.buckets] == [(64, 64, 2), (80, 48, 1), (128, 32, 1)]
    small = checked(tmp_path, {}, buckets=usual_buckets(64, upscale=False))
    assert any(line.startswith("dot.png: found 1x1 pixels, expected 8 at least") for line in small.left_out)
    assert len(small.pictures) == 3


def test_copies_and_near_copies(tmp_path: Path):
    one, other = noise(1, 128, 128), noise(2, 128, 128)
    found = checked(
        tmp_path,
        {
            "1.png": encoded(one), "1 copy.png": encoded(one), "1 small.jpg": encoded(one.resize((90, 90)), "JPEG"),
            "1 soft.webp": encoded(one.filter(ImageFilter.GaussianBlur(1)), "WEBP", quality=40),
            "1 cut.png": encoded(one.crop((2, 2, 126, 126))),
            "1 blue.png": encoded(Image.merge("RGB", one.split()[::-1])), "1 turned.png": encoded(one.rotate(180)),
            "2.png": encoded(other), "3.png": encoded(noise(3)),
        },
    )  # fmt: skip
    assert found.duplicates == (("1 copy.png", "1.png"),)
    assert found.alike == (("1 copy.png", "1 cut.png", "1 small.jpg", "1 soft.webp"),)
    faults = {seen.name: seen.faults for seen in found.pictures}
    assert faults["1.png"] == ("the same file as 1 copy.png",)
    assert faults["1 small.jpg"] == ("looks like 1 copy.png and 2 more",)
    assert not any(faults[name] for name in ("1 blue.png", "1 turned.png", "2.png", "3.png"))


def test_many_plain_pictures_are_told_apart(tmp_path: Path):
    """Small objects on one white ground: nearly all of their hash is the ground's."""
    ground = Image.new("RGB", (64, 64), "white")
    files = {}
    for number in range(24):
        picture = ground.copy()
        picture.paste(noise(number, 34, 34), (15, 15))
        files[f"{number:02}.jpg"] = encoded(picture, "JPEG", quality=80)
    assert not checked(tmp_path, files).alike


def test_the_same_shape_in_other_colors_is_another_picture(tmp_path: Path):
    files = {}
    for color in ("crimson", "seagreen", "slateblue"):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(Image.new("RGB", (14, 14), color), (26, 26))
        files |= {f"{color}.png": encoded(picture), f"{color}.jpg": encoded(picture, "JPEG")}
    pairs = tuple((f"{color}.jpg", f"{color}.png") for color in ("crimson", "seagreen", "slateblue"))
    assert checked(tmp_path, files).alike == pairs


def test_captions(tmp_path: Path):
    files = {f"{name}.png": encoded(noise(index)) for index, name in enumerate("abc")}
    files |= {"a.txt": b"word " * 75, "b.txt": b"word " * 74}
    defaults = Defaults(CaptionRules(prefix="sks"), class_tokens="")
    found = checked(tmp_path, files, defaults, count_tokens=lambda caption: len(caption.split()))
    assert [seen.tokens for seen in found.pictures] == [76, 75, 1]
    assert found.wordy == ("a.png",) and found.uncaptioned == ("c.png",)
    assert found.pictures[0].faults == ("caption of 76 tokens: cut after 75",)
    assert found.pictures[2].faults == ("no caption",)


def test_masks_are_looked_at(tmp_path: Path):
    files = {f"{name}.png": encoded(noise(index)) for index, name in enumerate("abcd")}
    files |= {
        "a-masklabel.png": encoded(Image.new("L", (32, 32), 255)), "b-masklabel.png": b"x",
        "c-masklabel.png": encoded(Image.new("L", (64, 32))),
    }  # fmt: skip
    found = checked(tmp_path, files)
    assert [(seen.name, seen.masked) for seen in found.pictures] == [("a.png", True), ("d.png", False)]
    assert found.left_out == (
        "b.png: its mask: found another kind of file, expected a PNG, JPEG or WebP picture",
        "c.png: its mask is 64x32, expected the shape of the picture, 64x64",
    )


def test_repeats_are_counted(tmp_path: Path):
    for name in ("3_cat", "reg_2_cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(noise(len(name))))
    found = checked(tmp_path, {})
    assert found.shown == 3 and [(b.pictures, b.shown) for b in found.buckets] == [(2, 5)]
    assert [(seen.repeats, seen.regular) for seen in found.pictures] == [(3, False), (2, True)]

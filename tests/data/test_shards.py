from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import decode, read_shards
from ldm.errors import LdmError

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], Path]


def test_samples_come_back_as_they_were_written(
    members: Members, pictures: np.ndarray, write_shard: WriteShard
) -> None:
    paths = [write_shard("a-00.tar", members[:6]), write_shard("a-01.tar", members[6:])]
    samples = list(read_shards(paths))
    assert [sample.record["texts"][0] for sample in samples] == [f"picture {i}" for i in range(5)]
    assert samples[4].record["license"] == "CC0-1.0"
    for sample, pixels in zip(samples, pictures, strict=True):
        np.testing.assert_array_equal(decode(sample.image, 8), pixels)


def replace(members: Members, name: str, content: bytes) -> Members:
    return [(found, content if found == name else old) for found, old in members]


FAULTS = {
    "missing record": (lambda m: [file for file in m if file[0] != "000002.json"], "000002.json: missing"),
    "missing picture": (lambda m: [file for file in m if file[0] != "000002.webp"], "000002: no picture"),
    "record cut short": (lambda m: replace(m, "000002.json", b'{"texts": ["a'), "000002.json: not JSON"),
    "record not UTF-8": (lambda m: replace(m, "000002.json", b"\xff\xfe\x00"), "000002.json: not JSON"),
    "record a list": (lambda m: replace(m, "000002.json", b"[]"), "000002.json: 'texts' is None"),
    "no captions": (lambda m: replace(m, "000002.json", b'{"texts": []}'), r"000002.json: 'texts' is \[\]"),
    "captions not text": (lambda m: replace(m, "000002.json", b'{"texts": [1]}'), r"000002.json: 'texts' is \[1\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sample_is_named_or_skipped(fault: str, members: Members, write_shard: WriteShard) -> None:
    spoil, message = FAULTS[fault]
    path = write_shard("bad-00.tar", spoil(members))
    with pytest.raises(LdmError, match=f"bad-00.tar: {message}"):
        list(read_shards([path]))
    skipped: list[str] = []
    kept = [sample.record["key"] for sample in read_shards([path], skipped)]
    assert kept == ["0", "1", "3", "4"]
    assert len(skipped) == 1


@pytest.mark.parametrize("cut", ["inside a file", "between files", "in a header", "empty", "not a tar", "absent"])
def test_a_shard_cut_short_is_never_taken_for_whole(cut: str, members: Members, write_shard: WriteShard) -> None:
    path = write_shard("cut-00.tar", members)
    whole = path.read_bytes()
    fourth_header = whole.index(b"000003.webp")
    content = {
        "inside a file": whole[: fourth_header + 600],
        "between files": whole[:fourth_header],
        "in a header": whole[: fourth_header + 100],
        "empty": b"",
        "not a tar": b"<html>404</html>" * 1000,
        "absent": None,
    }[cut]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(LdmError, match=r"cut-00\.tar: "):
        list(read_shards([path]))
    skipped: list[str] = []
    kept = [sample.record["key"] for sample in read_shards([path], skipped)]
    assert kept == ["0", "1", "2"][: len(kept)]  # the one before the cut may go with it
    assert len(kept) >= (2 if fourth_header < len(content or b"") and cut != "not a tar" else 0)
    assert skipped


def test_two_files_of_one_name_are_a_fault(members: Members, write_shard: WriteShard) -> None:
    path = write_shard("twice-00.tar", [members[0], *members])
    with pytest.raises(LdmError, match=r"twice-00\.tar: .*duplicate"):
        list(read_shards([path]))


def png(size: tuple[int, int], mode: str = "RGB", color: object = None) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "cannot be decoded"),
        (b"<html>404</html>", "cannot be decoded"),
        (png((8, 8))[:45], "cannot be decoded"),
        (png((8, 4)), "8x4 pixels, expected a square"),
        (png((5000, 5000), "1"), "5000x5000 pixels, expected a square of at most 4096"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(image: bytes, message: str) -> None:
    with pytest.raises(LdmError, match=f"sample 7: {message}"):
        decode(image, 8, "sample 7")


def test_shrinking_averages_areas() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2] = [[[0] * 3, [100] * 3], [[100] * 3, [200] * 3]]  # the first of four areas has the mean 100
    pixels[2:, 2:] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    expected = np.array([[100, 0], [0, 255]], np.uint8)[..., None].repeat(3, -1)
    np.testing.assert_array_equal(decode(stream.getvalue(), 2), expected)


def test_grey_and_palette_pictures_become_rgb() -> None:
    np.testing.assert_array_equal(decode(png((2, 2), "L", 77), 2), np.full((2, 2, 3), 77, np.uint8))

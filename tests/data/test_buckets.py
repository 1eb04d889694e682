"""Buckets against the lists and the arithmetic that sd-scripts' users know."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.buckets import Buckets, bucket_of, bucket_sizes, cut, usual_buckets
from ldm.errors import LdmError

KOHYA_512 = [
    (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
]  # fmt: skip
"""What sd-scripts prints for --resolution=512 with its defaults, 256 to 1024 by 64."""

SIDES = st.integers(1, 5000)
RANGES = st.sampled_from([(512, 256, 1024, 64), (128, 64, 256, 16), (128, 64, 256, 8), (1000, 300, 1500, 64)])


def test_the_known_list():
    assert list(bucket_sizes(512, 256, 1024, 64)) == KOHYA_512
    assert list(usual_buckets(512).sizes) == KOHYA_512


@given(st.integers(64, 1200), st.sampled_from([8, 16, 32, 64]))
def test_sizes_by_brute_force(side: int, step: int):
    """Every pair of multiples that is within the limits, and as large as its one side and the area allow."""
    least, most = max(step, side // 2 // step * step), 2 * side
    found = set(bucket_sizes(side, least, most, step))
    lengths = range(least, most + 1, step)
    wanted = {(side // step * step, side // step * step)}
    for width in lengths:
        heights = [height for height in range(step, 8 * most, step) if width * height <= side**2]
        if heights and heights[-1] >= least:
            height = min(heights[-1], most)
            wanted |= {(width, height), (height, width)}
    assert found == wanted


@given(SIDES, SIDES, RANGES)
def test_a_picture_gets_the_nearest_aspect_and_covers_it(width: int, height: int, of: tuple[int, int, int, int]):
    buckets = Buckets(*of)
    crop = buckets.crop(width, height)
    if (width, height) in buckets.sizes:
        assert crop.bucket == crop.scaled == (width, height)
    else:
        errors = [abs(w / h - width / height) for w, h in buckets.sizes]
        assert abs(crop.bucket[0] / crop.bucket[1] - width / height) == min(errors)
    assert min(crop.spare) == 0 and crop.left == crop.spare[0] // 2 and crop.top == crop.spare[1] // 2
    scale = max(crop.bucket[0] / width, crop.bucket[1] / height)
    assert crop.scaled == (int(width * scale + 0.5), int(height * scale + 0.5))
    assert 0 < crop.kept <= 1


@pytest.mark.parametrize(
    ("size", "scaled", "bucket"),
    [
        ((1000, 800), (512, 410), (512, 384)),  # sqrt(512^2 * 1.25) = 572 -> 512, 512 / 1.25 = 410: 4:3 is nearer
        ((4000, 3000), (512, 384), (512, 384)),
        ((3000, 1000), (768, 256), (768, 256)),
        ((300, 200), (300, 200), (256, 192)),  # smaller than it might be: left as it is
        ((512, 512), (512, 512), (512, 512)),
        ((64, 64), (64, 64), (64, 64)),
    ],
)
def test_nothing_enlarged_by_hand(size: tuple[int, int], scaled: tuple[int, int], bucket: tuple[int, int]):
    crop = usual_buckets(512, upscale=False).crop(*size)
    assert (crop.scaled, crop.bucket) == (scaled, bucket)


@given(st.integers(64, 4000), st.integers(64, 4000))
def test_nothing_enlarged(width: int, height: int):
    step, area = 64, 512 * 512
    crop = Buckets(512, 256, 1024, step, upscale=False).crop(width, height)
    assert crop.scaled[0] <= width + 1 and crop.scaled[1] <= height + 1
    assert all(side % step == 0 for side in crop.bucket) and all(0 <= spare < step for spare in crop.spare)
    if width * height <= area:
        assert crop.scaled == (width, height)
    elif 0.2 < width / height < 5:
        assert crop.scaled[0] * crop.scaled[1] <= area * 1.1 and any(side % step == 0 for side in crop.scaled)
        assert math.isclose(crop.scaled[0] / crop.scaled[1], width / height, rel_tol=0.01)


def test_too_small_to_be_left_as_it_is():
    with pytest.raises(LdmError, match="found 40x300 pixels, expected 64 at least each way"):
        usual_buckets(512, upscale=False).crop(40, 300)


@pytest.mark.parametrize("wrong", [(128, 64, 256, 4), (128, 64, 256, 12), (128, 160, 256, 16), (128, 64, 100, 16)])
def test_limits_that_make_no_sense(wrong: tuple[int, int, int, int]):
    with pytest.raises(LdmError, match=r"^buckets: "):
        Buckets(*wrong)


def test_of_two_as_near_the_first():
    assert bucket_of(5, 4, [(64, 64), (96, 64)]) == (64, 64)  # 1.25 is as far from 1 as from 1.5


@given(st.integers(20, 300), st.integers(20, 300), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_random_crops_stay_inside(width: int, height: int, across: float, down: float):
    crop = Buckets(64, 32, 128, 16).crop(width, height).at(across, down)
    assert 0 <= crop.left <= crop.spare[0] and 0 <= crop.top <= crop.spare[1]


def test_cutting():
    """A ramp whose levels tell where each pixel came from."""
    ramp = Image.linear_gradient("L").rotate(90).resize((400, 100)).convert("RGB")
    crop = Buckets(64, 32, 128, 16).crop(400, 100)
    assert (crop.scaled, crop.bucket, crop.left) == ((128, 32), (128, 32), 0)
    crop = Buckets(64, 64, 64, 16).crop(400, 100)
    assert (crop.scaled, crop.bucket, crop.left, crop.top) == ((256, 64), (64, 64), 96, 0)
    levels = [
        cut(ramp, crop.at(across, 0)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[0]
        for across in (0, 0.5, 0.999)
    ]
    expected = [255 * (256 - 32) / 256, 127.5, 255 * 32 / 256]
    assert levels == pytest.approx(expected, abs=3) or levels == pytest.approx(expected[::-1], abs=3)
    assert cut(ramp, crop).size == (64, 64)
    assert cut(ramp.resize((200, 50)), crop).size == (64, 64)  # one that was shrunk while it was decoded

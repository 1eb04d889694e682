"""Masks: read as they are meant, faded inwards, and never a pixel pasted that was to be kept."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm.errors import LdmError
from ldm.pipeline.images import as_mask, picture_bytes
from ldm.pipeline.masks import Window, fade, mask_of, pasted, window_for
from ldm.pipeline.request import GenerateRequest


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def request(mask: Image.Image | None = None, **fields: object) -> GenerateRequest:
    if mask is not None:
        fields = {"mask": encoded(mask), "image": encoded(Image.new("RGB", mask.size))} | fields
    return GenerateRequest(prompt="x", **fields)  # pyright: ignore[reportArgumentType]


def column(*levels: int) -> Image.Image:
    return Image.fromarray(np.array([levels], dtype=np.uint8))


def test_white_is_redrawn_from_half_grey_on():
    grey = column(0, 127, 128, 255)
    assert mask_of(request(grey)).tolist() == [[0, 0, 1, 1]]
    assert mask_of(request(grey, mask_invert=True)).tolist() == [[1, 1, 0, 0]]


def test_a_soft_mask_is_shares_of_the_steps_rounded_down():
    grey = column(0, 31, 32, 128, 254, 255)  # of 8 steps: 0.97, 1.004, 4.02, 7.97
    fields = {"mask_soft": True, "steps": 16, "strength": 0.5}
    assert mask_of(request(grey, **fields)).tolist() == [[0, 0, 1 / 8, 4 / 8, 7 / 8, 1]]
    inverted = mask_of(request(grey, **fields, mask_invert=True))
    assert inverted.tolist() == [[1, 7 / 8, 6 / 8, 3 / 8, 0, 0]]  # of 127 there are 3.98


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(np.array([[0, 0xFFFF]], dtype=np.uint16)),
        Image.fromarray(np.array([[[0, 0, 99], [255, 255, 0]]], dtype=np.uint8)),  # blue is dark and yellow bright
        Image.fromarray(np.array([[[255, 255, 255, 0], [255, 255, 255, 255]]], dtype=np.uint8)),  # painted on glass
        Image.fromarray(np.array([[[255, 0], [255, 200]]], dtype=np.uint8), "LA"),
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1"),
    ],
    ids=["16 bit", "RGB", "RGBA", "LA", "1 bit"],
)
def test_every_mode(mask):
    assert mask_of(request(mask)).tolist() == [[0, 1]]
    assert (np.asarray(as_mask(mask))[0] > 127).tolist() == [False, True]


def test_what_is_refused():
    with pytest.raises(LdmError, match="mask: found 4x1, expected the size of image, 5x1"):
        request(column(0, 0, 255, 0), image=encoded(Image.new("RGB", (5, 1))))
    for mask, fields in ((column(0, 127), {}), (column(255, 255), {"mask_invert": True})):
        with pytest.raises(LdmError, match="mask: found nothing to redraw"):
            request(mask, **fields)
    with pytest.raises(LdmError, match="mask: found nothing to redraw"):
        request(column(60), mask_soft=True, steps=4, strength=1.0)
    with pytest.raises(LdmError, match="image: found a part of 1x60000 to draw"):
        window_for(np.ones((60000, 1), dtype=np.float32), request(), 64)


# ---- the fade


def straight_from_the_definition(inside: np.ndarray, limit: int) -> np.ndarray:
    """The distance of every pixel to every kept one."""
    rows, columns = np.nonzero(~inside)
    y, x = np.indices(inside.shape)
    far = (y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2
    return np.minimum(np.sqrt(far.min(axis=-1, initial=10**6)), limit)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9), st.integers(0, 2**32), st.floats(0.02, 0.9))
def test_the_fade_rises_with_the_distance_from_what_is_kept(width, height, blur, seed, kept):
    inside = np.random.default_rng(seed).random((height, width)) > kept**4
    inside[height // 2, width // 2] = True
    alpha = np.asarray(fade(inside.astype(np.float32), blur))
    distance = straight_from_the_definition(inside, blur + 1)
    assert ((alpha > 0) == inside).all()
    assert (alpha[distance == blur + 1] == 255).all()
    rise = distance / (blur + 1)
    assert (alpha >= np.floor(255 * rise**2 * (3 - 2 * rise))).all()  # never later than over the whole width
    top = distance == distance.max()
    assert (alpha[top] == 255).all()


def test_the_fade_of_a_wide_mask_is_symmetrical_about_its_middle():
    inside = np.zeros((1, 40), dtype=np.float32)
    inside[:, 10:] = 1
    alpha = np.asarray(fade(inside, 7))[0].astype(int)
    assert alpha[9] == 0 and alpha[10] > 0 and alpha[17:].tolist() == [255] * 23
    assert np.abs(alpha[10:17] + alpha[10:17][::-1] - 255).max() <= 2


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 9])
def test_a_thin_line_is_whole_on_its_middle(thickness):
    image = Image.new("L", (60, 60))
    ImageDraw.Draw(image).rectangle((20, 10, 20 + thickness - 1, 50), fill=255)
    alpha = np.asarray(fade(np.asarray(image, dtype=np.float32) / 255, 16))
    assert alpha[30, 20 + (thickness - 1) // 2] == 255 == alpha[30, 20 + thickness // 2]
    assert not alpha[30, :20].any() and not alpha[30, 20 + thickness :].any()


def test_the_edge_of_the_picture_is_no_edge_of_the_mask():
    inside = np.zeros((20, 20), dtype=np.float32)
    inside[:, 10:] = 1
    alpha = np.asarray(fade(inside, 4))
    assert (alpha == alpha[0]).all() and alpha[0, -1] == 255
    assert (np.asarray(fade(np.ones((9, 5), dtype=np.float32), 30)) == 255).all()


# ---- the window

SIDES = st.integers(1, 300)


@st.composite
def masks(draw: st.DrawFn, largest: int = 300) -> np.ndarray:
    """A mask with a few white rectangles and lines in it."""
    width, height = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    mask = np.zeros((height, width), dtype=np.float32)
    for _ in range(draw(st.integers(1, 3))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right, bottom = draw(st.integers(left, width - 1)), draw(st.integers(top, height - 1))
        mask[top : bottom + 1, left : right + 1] = 1
    return mask


sizes = st.none() | st.integers(8, 40).map(lambda n: 8 * n)


@settings(deadline=None, max_examples=200)
@given(masks(), st.booleans(), st.integers(0, 40), sizes, sizes)
def test_a_window_holds_all_that_is_redrawn_and_keeps_its_shape(mask, only_masked, padding, width, height):
    fields = {"width": width, "height": height} | ({"mask_padding": padding} if only_masked else {})
    given_ = request(Image.fromarray(np.uint8(255 * mask)), only_masked=only_masked, **fields)
    window = window_for(mask, given_, 128)
    left, top, right, bottom = window.box
    rows, columns = np.nonzero(mask)
    if only_masked:
        assert left <= columns.min() and columns.max() < right and top <= rows.min() and rows.max() < bottom
    else:
        assert left <= 0 and top <= 0 and right >= mask.shape[1] and bottom >= mask.shape[0]
    assert all(side % 8 == 0 and 64 <= side <= 2048 for side in window.size)
    (across, down), (w, h) = window.box_size, window.size
    assert abs(across * h - down * w) <= max(w, h)  # the same shape, to a pixel
    # What stands out of the picture does so on both sides alike, and only where the picture ends.
    if left < 0 or right > mask.shape[1]:
        assert left <= 0 and right >= mask.shape[1] and abs(left + right - mask.shape[1]) <= 1
    # Given as a size, as `resolve` records it, the same size leads to the same window.
    assert window_for(mask, given_.changed(width=w, height=h), 128) == window
    # A cell is free when it overlaps a pixel to redraw, and only then.
    part = mask[np.ix_(np.arange(top, bottom).clip(0, len(mask) - 1), np.arange(left, right).clip(0, len(mask[0]) - 1))]
    free = _overlaps(_overlaps(part, h // 8).T, w // 8).T
    assert np.array_equal(window.pooled(mask, w // 8, h // 8)[0, 0].numpy(), free)


def _overlaps(mask: np.ndarray, cells: int) -> np.ndarray:
    """(n, m) -> (cells, m): whether a cell, n / cells rows high, overlaps a row that is 1."""
    n = len(mask)
    return np.stack([mask[i * n // cells : -(-(i + 1) * n // cells)].max(axis=0) for i in range(cells)])


@pytest.mark.parametrize(
    ("size", "model", "drawn", "box"),
    [
        ((101, 67), 128, (160, 104), (-1, 0, 102, 67)),  # far smaller than the model's: drawn larger
        ((130, 125), 128, (136, 128), (-3, -2, 133, 126)),  # near: edge pixels around it
        ((512, 768), 512, (512, 768), (0, 0, 512, 768)),
        ((4000, 3000), 512, (592, 440), (-18, 0, 4018, 3000)),
    ],
)
def test_sizes(size, model, drawn, box):
    window = window_for(np.ones(size[::-1], dtype=np.float32), request(), model)
    assert (window.size, window.box) == (drawn, box)
    assert bool(window.notes) == (window.size != window.box_size)


def test_what_stands_out_of_the_picture_goes_on_with_its_edge():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    part = np.asarray(Window((-1, 0, 3, 3), (4, 3)).of(picture))
    first = [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    second = [[6, 7, 8], [6, 7, 8], [9, 10, 11], [9, 10, 11]]
    assert part.tolist() == [first, second, second]


@settings(deadline=None, max_examples=150)
@given(masks(120), st.integers(0, 20), st.booleans(), sizes, sizes, st.integers(0, 2**32))
def test_a_paste_changes_nothing_outside_of_the_mask(mask, blur, only_masked, width, height, seed):
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8))
    given_ = request(Image.fromarray(np.uint8(255 * mask)), only_masked=only_masked, width=width, height=height)
    window = window_for(mask, given_, 128)
    drawn = Image.fromarray(rng.integers(0, 256, (window.size[1], window.size[0], 3), dtype=np.uint8))
    result = pasted(picture, drawn, window, fade(mask, blur))
    assert result.size == picture.size
    assert np.array_equal(np.asarray(result)[mask == 0], np.asarray(picture)[mask == 0])
    if window.size == window.box_size and blur == 0:
        left, top, _, _ = window.box
        rows, columns = np.nonzero(mask)
        assert np.array_equal(np.asarray(result)[rows, columns], np.asarray(drawn)[rows - top, columns - left])


def test_a_mask_in_memory_is_read_as_its_file_is():
    painted = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    painted.putpixel((1, 2), (255, 255, 255, 255))
    alone = GenerateRequest(prompt="x", image=picture_bytes(Image.new("RGB", (4, 4))), mask=encoded(as_mask(painted)))
    assert np.argwhere(mask_of(alone)).tolist() == [[2, 1]]

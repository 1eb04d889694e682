"""Where a picture is redrawn: its mask, the part that is worked on, and the paste that leaves all else bit for bit.

A mask is an (H, W) float32 array in a picture's own pixels, 0 kept ... 1 redrawn. Pictures are RGB images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import LdmError
from ldm.pipeline.images import MAX_PIXELS, read_mask, shape_like
from ldm.pipeline.request import GenerateRequest, whole_steps

Mask = NDArray[np.float32]
Box = tuple[int, int, int, int]
"""left, top, right, bottom; the last two are not in it."""

SMALLEST, LARGEST = 64, 2048
"""The sides, in pixels, that a model draws."""

NEAR = (0.75, 2.0)
"""A picture with this many times the pixels that a model was trained on is drawn at its own size."""


def mask_of(request: GenerateRequest) -> Mask:
    """The request's mask: 0 and 1, or with `mask_soft` shares of its steps, whole steps each."""
    assert request.mask is not None
    grey = read_mask(request.mask)
    levels = np.asarray(ImageOps.invert(grey) if request.mask_invert else grey)
    if not request.mask_soft:
        return (levels >= 128).astype(np.float32)
    steps = request.steps_to_run
    return np.array([whole_steps(level / 255, steps) / steps for level in range(256)], dtype=np.float32)[levels]


@dataclass(frozen=True)
class Window:
    """The part of a picture that is drawn, and how large.

    box:  in the picture's pixels; where it stands out of the picture, the pixels at the edge go on
    size: (width, height) that it is drawn at; nothing is resampled where that is the size of the box
    """

    box: Box
    size: tuple[int, int]

    @property
    def box_size(self) -> tuple[int, int]:
        """(width, height) of the box."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        if self.size == self.box_size:
            return ()
        (width, height), (w, h) = self.box_size, self.size
        return (f"drawn at {w}x{h} and scaled to {width}x{height}",)

    def of(self, picture: Image.Image) -> Image.Image:
        """That part of a picture, at `size`."""
        part = Image.fromarray(_cut(np.asarray(picture), self.box))
        return part if part.size == self.size else part.resize(self.size, Image.Resampling.LANCZOS)

    def pooled(self, mask: Mask, width: int, height: int) -> Tensor:
        """That part of a mask on a grid of width x height, (1, 1, height, width): each cell the largest it touches.

        So no pixel that is to be redrawn lies in a cell that is not.
        """
        part = torch.from_numpy(_cut(mask, self.box))
        return F.adaptive_max_pool2d(part[None, None], (height, width))


def window_for(mask: Mask, request: GenerateRequest, side: int) -> Window:
    """The whole picture, or with `only_masked` what is redrawn and `mask_padding` pixels around it, as large as can be.

    side: of the pictures that the model was trained on. Drawn is at the request's size, by default at the part's own,
    padded to multiples of 8, where that is NEAR the model's, and at the model's otherwise. The part grows to the shape
    of what is drawn, within the picture while there is room. Raises `LdmError` for a part too narrow to be drawn.
    """
    height, width = mask.shape
    left, top, right, bottom = (0, 0, width, height)
    if request.only_masked:
        left, top, right, bottom = _bounds(mask > 0, request.mask_padding)
    part = right - left, bottom - top
    default = _size_for(part, side)
    size = request.width or default[0], request.height or default[1]
    grown = _grown(part, size)
    if grown[0] * grown[1] > 4 * MAX_PIXELS:
        raise LdmError(
            f"image: found a part of {part[0]}x{part[1]} to draw, expected one less long and narrow; draw less of it"
        )
    (left, right), (top, bottom) = (
        _placed(left, right, grown[0], width), _placed(top, bottom, grown[1], height)
    )  # fmt: skip
    return Window((left, top, right, bottom), size)


def _size_for(part: tuple[int, int], side: int) -> tuple[int, int]:
    """The size to draw a part at: its own, padded, or about side^2 pixels in its shape."""
    width, height = (max(SMALLEST, -(-edge // 8) * 8) for edge in part)
    if max(width, height) <= LARGEST and NEAR[0] <= width * height / side**2 <= NEAR[1]:
        return width, height
    return shape_like(part, side)


def _grown(part: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest box that holds a part and has the shape of `size`; or of that size, where it hardly exceeds."""
    spare = [edge - own for own, edge in zip(part, size, strict=True)]
    if 0 <= min(spare) < 8:
        return size
    scale = max(own / edge for own, edge in zip(part, size, strict=True))
    width, height = (max(own, round(edge * scale)) for own, edge in zip(part, size, strict=True))
    return width, height


def _placed(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of `length` around another: inside of 0 ... limit where it fits, else that in its middle."""
    first = (start + stop - length) // 2
    first = (limit - length) // 2 if length > limit else min(max(first, 0), limit - length)
    return first, first + length


def _bounds(inside: NDArray[np.bool_], margin: int) -> Box:
    """The smallest box around what is True, and `margin` pixels more on each side that has them."""
    (top, bottom), (left, right) = (np.flatnonzero(inside.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0))
    height, width = inside.shape
    return (
        max(0, left - margin), max(0, top - margin), min(width, right + 1 + margin), min(height, bottom + 1 + margin)
    )  # fmt: skip


def _cut(pixels: NDArray[Any], box: Box) -> NDArray[Any]:
    """The box of (H, W) or (H, W, C), which goes on beyond its edges with the pixels there."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, pixels.shape[0] - 1)
    columns = np.arange(left, right).clip(0, pixels.shape[1] - 1)
    return pixels[rows[:, None], columns]


def fade(mask: Mask, blur: int) -> Image.Image:
    """How much of the new is pasted, 0 ... 255, mode L: 0 wherever the mask is 0, rising over `blur` pixels inwards.

    From the mask's edge on it rises smoothly with the Euclidean distance to what is kept. Where the mask is too narrow
    for the whole rise, the rise is shortened, so that it reaches 255 on the middle line. The edges of the picture are
    no edges of the mask.
    """
    inside = mask > 0
    alpha = np.zeros(mask.shape, dtype=np.uint8)
    left, top, right, bottom = _bounds(inside, margin=1)
    depth = _depth(inside[top:bottom, left:right], blur + 1)
    rise = depth / np.maximum(_largest_near(depth, blur + 1), 1)
    alpha[top:bottom, left:right] = np.ceil(255 * rise**2 * (3 - 2 * rise))
    return Image.fromarray(alpha)


def _depth(inside: NDArray[np.bool_], limit: int) -> Mask:
    """Each pixel's distance to the nearest one that is not inside, at most `limit`; all beyond the edges is inside.

    Exact: a squared Euclidean distance is a minimum over rows of a minimum over columns (Felzenszwalb and Huttenlocher
    2012).
    """
    squared = np.where(inside, limit**2, 0).astype(np.float32)
    for _ in range(2):
        length = len(squared)
        padded = np.pad(squared, ((limit, limit), (0, 0)), constant_values=limit**2)
        for away in range(-limit, limit + 1):
            np.minimum(squared, padded[limit + away : limit + away + length] + away**2, out=squared)
        squared = squared.T
    return np.sqrt(squared)


def _largest_near(values: Mask, radius: int) -> Mask:
    """The largest value in the square of `radius` around each pixel."""
    found = torch.from_numpy(values)[None, None]
    for kernel, padding in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
        found = F.max_pool2d(found, kernel, 1, padding)
    return found[0, 0].numpy()


def pasted(picture: Image.Image, drawn: Image.Image, window: Window, alpha: Image.Image) -> Image.Image:
    """The picture with what was drawn of a window laid over it: bit for bit the same wherever alpha is 0."""
    if drawn.size != window.box_size:
        drawn = drawn.resize(window.box_size, Image.Resampling.LANCZOS)
    result = picture.copy()
    result.paste(drawn, window.box[:2], alpha.crop(window.box))
    return result

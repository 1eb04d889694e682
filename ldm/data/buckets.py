"""Aspect-ratio buckets: pictures of like shape are trained on together, in sizes of about the same area.

The rule is that of kohya's sd-scripts (`make_bucket_resolutions`, `BucketManager.select_bucket`), after NovelAI's
"Improvements on Stable Diffusion" of 2022: a picture goes to the size whose aspect is nearest to its own, is scaled to
cover it, and loses what stands out. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm.errors import LdmError

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """What of a picture is trained on: scaled from `original` to `scaled`, then `bucket` pixels from (left, top) on.

    SDXL is told `original`, and (top, left).
    """

    original: Size
    scaled: Size
    bucket: Size
    left: int
    top: int

    @property
    def spare(self) -> Size:
        """How many pixels are cut off in all, across and down."""
        return self.scaled[0] - self.bucket[0], self.scaled[1] - self.bucket[1]

    @property
    def kept(self) -> float:
        """The share of the picture that is left, above 0 and at most 1."""
        return self.bucket[0] * self.bucket[1] / (self.scaled[0] * self.scaled[1])

    def at(self, across: float, down: float) -> Crop:
        """The same elsewhere in the picture; both in [0, 1), as drawn for a random crop."""
        return replace(self, left=int(across * (self.spare[0] + 1)), top=int(down * (self.spare[1] + 1)))


@dataclass(frozen=True)
class Buckets:
    """Which sizes there are.

    side: of the square with the area that none exceeds
    least, most: of a side
    step: what every side is a multiple of
    upscale: whether small pictures are enlarged; else each gets the largest size within its own
    """

    side: int
    least: int
    most: int
    step: int
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.step < 8 or self.step % 8:
            raise LdmError(f"buckets: step is {self.step}, expected a multiple of 8")
        if not self.step <= self.least <= self.side <= self.most:
            found = f"step {self.step}, least {self.least}, side {self.side}, most {self.most}"
            raise LdmError(f"buckets: found {found}, expected step <= least <= side <= most")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All of them; those of `upscale`."""
        return bucket_sizes(self.side, self.least, self.most, self.step)

    def crop(self, width: int, height: int) -> Crop:
        """What of a picture of this size is kept: its middle.

        Raises LdmError where nothing may be enlarged and the picture is smaller than a step.
        """
        if self.upscale:
            return _covering((width, height), bucket_of(width, height, self.sizes))
        return _within((width, height), self.side**2, self.step)


def usual_buckets(side: int, *, step: int | None = None, upscale: bool = True) -> Buckets:
    """Sides from half to twice `side`, as kohya has them for 512; steps of 64 as there, and finer for small models."""
    step = step or min(64, max(8, side // 64 * 8))
    return Buckets(side, max(step, side // 2), 2 * side, step, upscale)


def bucket_sizes(side: int, least: int, most: int, step: int) -> tuple[Size, ...]:
    """All sizes with sides from `least` to `most` in steps, of at most side^2 pixels, sorted; the square is always in.

    To each width belongs the largest height, and the other way round.
    """
    square = side // step * step
    sizes = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, side**2 // width // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def bucket_of(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The picture's own size where it is one of them, else that with the nearest aspect; of two the first."""
    if (width, height) in sizes:
        return width, height
    return min(sizes, key=lambda size: abs(size[0] / size[1] - width / height))


def cut(picture: Image.Image, crop: Crop) -> Image.Image:
    """The part of a picture that is trained on. The picture may be smaller or larger than `crop.original`."""
    from PIL import Image

    scaled = picture if picture.size == crop.scaled else picture.resize(crop.scaled, Image.Resampling.LANCZOS)
    return scaled.crop((crop.left, crop.top, crop.left + crop.bucket[0], crop.top + crop.bucket[1]))


def _covering(original: Size, bucket: Size) -> Crop:
    width, height = original
    wide = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if wide else bucket[0] / width
    return _centred(original, (int(width * scale + 0.5), int(height * scale + 0.5)), bucket)


def _within(original: Size, area: int, step: int) -> Crop:
    """The picture's own size in whole steps; scaled down first where it has more than `area` pixels."""
    scaled = original if original[0] * original[1] <= area else _reduced(original, area, step)
    bucket = scaled[0] // step * step, scaled[1] // step * step
    if 0 in bucket:
        raise LdmError(
            f"found {original[0]}x{original[1]} pixels, expected {step} at least each way; let it be enlarged"
        )
    return _centred(original, scaled, bucket)


def _reduced(original: Size, area: int, step: int) -> Size:
    """About `area` pixels, one side in whole steps: the one that leaves the aspect nearer to what it was."""
    aspect = original[0] / original[1]

    def stepped(length: float) -> int:
        return max(step, int(length + 0.5) // step * step)

    width, height = stepped(math.sqrt(area * aspect)), stepped(math.sqrt(area / aspect))
    by_width = abs(width / stepped(width / aspect) - aspect)
    by_height = abs(stepped(height * aspect) / height - aspect)
    if by_width < by_height:
        return width, int(width / aspect + 0.5)
    return int(height * aspect + 0.5), height


def _centred(original: Size, scaled: Size, bucket: Size) -> Crop:
    return Crop(original, scaled, bucket, (scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)

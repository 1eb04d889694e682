"""Noise that belongs to one picture: sample i of a batch depends on its own seed and on nothing else.

Every sample has its own generator on the CPU, so it comes out the same alone, in a batch, on any rank and, up to the
device's arithmetic, on any device. The start noise is the first thing drawn from it, the noise of the steps follows.

C, h, w: the shape of one sample, any number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.brownian import BrownianPath
from ldm.diffusion.philox import Philox

Rng = Literal["cpu", "philox", "comfy"]
"""Whose noise a seed gives: PyTorch's on the CPU, AUTOMATIC1111's (PyTorch's on a GPU), or ComfyUI's."""

Draw = Callable[[float, float], Tensor]
"""(sigma, sigma_next) -> the next unit noise of one sample, (C, h, w), float32, on the CPU."""


@dataclass(frozen=True, eq=False)
class PerImageNoise:
    """A NoiseSource for one run of a sampler. Each call draws on, so a second run needs a second source.

    start: (B, C, h, w) float32, the unit noise a run from scratch begins with
    draws: for each sample, where the noise of the steps comes from
    """

    start: Tensor
    draws: tuple[Draw, ...]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise (B, C, h, w), float32, independent of all that was drawn before for levels that do not overlap."""
        return torch.stack([draw(sigma, sigma_next) for draw in self.draws]).to(self.start.device)


def per_image_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    rng: Rng = "cpu",
    batch_index: int = 0,
    variation: tuple[Sequence[int], float] | None = None,
    brownian: bool = False,
) -> PerImageNoise:
    """The noise of samples of `shape` (C, h, w), one for each seed in 0..2^63-1: drawn on the CPU, put on `device`.

    rng:         "comfy": the samples have one seed, and sample i is row batch_index + i of its start noise; that of
                 their steps is ComfyUI's on a CPU for a batch of one, and of the same kind for the other rows
    batch_index: of the first sample, in the batch that it was first drawn in; "comfy" alone looks at it
    variation:   (seeds, strength): the start is moved towards the noise of these seeds (see `slerp`)
    brownian:    the noise of the steps is the increment of one Brownian path per sample, divided by its deviation, so
                 that it depends on the levels but not on what other levels are asked (see `ldm.diffusion.brownian`)
    """
    sources = [_source(shape, seed, rng, batch_index + index) for index, seed in enumerate(seeds)]
    start = torch.stack([first for first, _ in sources])
    if variation is not None and variation[1] > 0:
        others = [_source(shape, seed, rng, batch_index + index)[0] for index, seed in enumerate(variation[0])]
        start = slerp(start, torch.stack(others), variation[1])
    draws = [draw for _, draw in sources]
    if brownian:
        places = [batch_index + index if rng == "comfy" else 0 for index in range(len(seeds))]
        paths = [BrownianPath(shape, seed, place) for seed, place in zip(seeds, places, strict=True)]
        draws = [partial(_unit_increment, path) for path in paths]
    return PerImageNoise(start.to(device), tuple(draws))


def start_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The start noise alone, (B, C, h, w) float32 on the CPU."""
    return per_image_noise(shape, seeds).start


def slerp(low: Tensor, high: Tensor, share: float) -> Tensor:
    """From `low` towards `high`, (B, C, h, w), along the arc between them (Shoemake 1985), which keeps their norm.

    As in AUTOMATIC1111, every column of a picture (the axis h) is a vector of its own. Parallel ones have no arc and
    go the straight way.
    """
    axis = min(2, low.ndim - 1)
    unit_low, unit_high = (t / t.norm(dim=axis, keepdim=True) for t in (low, high))
    angle = (unit_low * unit_high).sum(dim=axis, keepdim=True).clamp(-1, 1).acos()
    arc = (((1 - share) * angle).sin() * low + (share * angle).sin() * high) / angle.sin()
    return torch.where(angle.sin() == 0, torch.lerp(low, high, share), arc)


def _source(shape: Sequence[int], seed: int, rng: Rng, place: int) -> tuple[Tensor, Draw]:
    """The start of one sample, and the noise of its steps; `place` is its row in the batch."""
    match rng:
        case "cpu":
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(*shape, generator=generator), lambda *_: torch.randn(*shape, generator=generator)
        case "philox":
            philox = Philox(seed)
            return philox.randn(shape), lambda *_: philox.randn(shape)
        case "comfy":
            # A batch that ends with this row: where it goes on, the row is the same but for its last 16 numbers at
            # some odd sizes, and so a picture does not depend on what was drawn after it.
            rows = torch.randn(place + 1, *shape, generator=torch.Generator().manual_seed(seed))
            steps = torch.Generator().manual_seed(seed + 1 + place)
            return rows[place], lambda *_: torch.randn(*shape, generator=steps)


def _unit_increment(path: BrownianPath, sigma: float, sigma_next: float) -> Tensor:
    return path.increment(sigma, sigma_next) / math.sqrt(abs(sigma - sigma_next))

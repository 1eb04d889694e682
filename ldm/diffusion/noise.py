"""Noise that belongs to one picture: sample i of a batch depends on its own seed and on nothing else.

Every sample has its own generator on the CPU, so it comes out the same alone, in a batch, on any rank and, up to the
device's arithmetic, on any device. The start noise is the first thing drawn from it, the noise of the steps follows.

C, h, w: the shape of one sample, any number of axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PerImageNoise:
    """A NoiseSource for one run of a sampler. Each call draws on, so a second run needs a second source.

    start: (B, C, h, w) float32, the unit noise a run from scratch begins with
    """

    start: Tensor
    generators: tuple[torch.Generator, ...]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Unit noise (B, C, h, w), float32, independent of all that was drawn before; the levels do not matter."""
        return _draw(self.start.shape[1:], self.generators).to(self.start.device)


def per_image_noise(shape: Sequence[int], seeds: Sequence[int], *, device: torch.device | str = "cpu") -> PerImageNoise:
    """The noise of samples of `shape` (C, h, w), one for each seed in 0..2^63-1: drawn on the CPU, put on `device`."""
    generators = tuple(torch.Generator().manual_seed(seed) for seed in seeds)
    return PerImageNoise(_draw(shape, generators).to(device), generators)


def start_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The start noise alone, (B, C, h, w) float32 on the CPU."""
    return per_image_noise(shape, seeds).start


def _draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])

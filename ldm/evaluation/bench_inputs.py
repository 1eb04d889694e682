"""What both sides of `ldm bench` are given, so that nothing but their code differs. Light.

Shapes: N tokens, D width of the text states, P width of the pooled ones, z latent channels, h and w latent sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16"]

TIMESTEP = 500
GUIDANCE = 7.5
PROMPT, NEGATIVE = "a red apple on a green table, by the window", "blurry"
SEED = 7


@dataclass(frozen=True)
class Work:
    """A model's shapes, and what it is to draw.

    size:    the picture's side in pixels; steps: of a whole picture
    latent:  (z, h, w); width: D; pooled: P, 0 where there is none
    sampler: of a whole picture: the one that the model is published with
    """

    size: int
    steps: int
    latent: tuple[int, int, int]
    width: int
    pooled: int
    sampler: Literal["ddim", "euler"]
    device: str = "cpu"

    def noise(self) -> Tensor:
        """(1, z, h, w), standard normal: a state in variance-preserving scale, or a latent to decode."""
        return self._random(0, 1, *self.latent)

    def states(self) -> Tensor:
        """(2, 77, D): text states of what is wanted, then of what is not."""
        return self._random(1, 2, 77, self.width)

    def pooled_states(self) -> Tensor:
        """(2, P) in the same order."""
        return self._random(2, 2, self.pooled)

    def _random(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + seed)
        return torch.randn(shape, generator=generator).to(self.device)


@dataclass(frozen=True)
class Setting:
    """How a user of diffusers has it run. frugal: with sliced attention and a tiled, sliced autoencoder."""

    dtype: Dtype
    channels_last: bool = False
    frugal: bool = False

    def __str__(self) -> str:
        named = {"channels last": self.channels_last, "sliced and tiled": self.frugal}
        return ", ".join([self.dtype, *(name for name, on in named.items() if on)])

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch has it."""
        return getattr(torch, self.dtype)


PLAIN = Setting("float32")
"""Exact, and what both sides' results are held against."""


@dataclass(frozen=True, eq=False)
class TuneBatch:
    """A step of training: latents and noise (B, z, h, w), timestep and weight (B,), states (B, N, D)."""

    latents: Tensor
    noise: Tensor
    timestep: Tensor
    weight: Tensor
    states: Tensor

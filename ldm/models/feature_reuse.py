"""A U-Net whose inner half is computed at some calls only, and remembered at the others.

What is deep in the network changes little from one step of a sampler to the next (Ma et al. 2024, "DeepCache"), and at
the finest level, which is always computed, details are made. It is faster, and not exact.
Shapes: B batch, C channels, h and w latent height and width.
"""

from __future__ import annotations

from torch import Tensor

from ldm.models.unet import UNet
from ldm.types import Conditioning


class FeatureReuse:
    """A `Network` over a U-Net, for the calls of one batch: it remembers what the last whole call found.

    every: of so many calls one is whole, the first; 1: all are
    outer: how many of the first and the last stages are computed at every call

    A call for a batch of another shape, as when guidance begins or ends, is whole.
    """

    def __init__(self, unet: UNet, every: int, outer: int = 1) -> None:
        self._unet, self._every, self._outer = unet, every, outer
        self._deep: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._since = 0

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), timestep (B,), cond -> (B, C', h, w)."""
        unet, inner = self._unet, len(self._unet.output_blocks) - self._outer
        if self._deep is None or x.shape != self._shape or self._since == self._every:
            embedding, skips, middle = unet.controlled(x, timestep, cond)
            self._deep = unet.widen(middle, skips, embedding, cond, inner)
            self._shape, self._since = tuple(x.shape), 0
        else:
            embedding, skips = unet.narrow(x, timestep, cond, self._outer)
            if cond.control:
                skips = [skip + residual for skip, residual in zip(skips, cond.control, strict=False)]
        self._since += 1
        return unet.out(unet.widen(self._deep, skips, embedding, cond, self._outer))

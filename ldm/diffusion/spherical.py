"""The way from one vector to another along the arc between them, where their directions carry the meaning.

`ldm.diffusion.noise.slerp` is another: AUTOMATIC1111's, of every column of a picture alone, which seeds depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def along_arc(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Row by row from `start` at share 0 to `end` at share 1, (B, ...): the angle and the length grow evenly.

    Shoemake 1985 for the directions; all numbers of a row are one vector. At the ends the result is bit for bit the
    one or the other. Raises ValueError for rows of length 0, and for opposite ones, between which there are many arcs.
    """
    low, high = start.double().flatten(1), end.double().flatten(1)
    first, last = low.norm(dim=1, keepdim=True), high.norm(dim=1, keepdim=True)
    if not bool((first * last > 0).all()):
        raise ValueError("a vector of length 0 has no direction")
    cosine = (low * high).sum(dim=1, keepdim=True) / (first * last)
    if bool((cosine < -1 + 1e-12).any()):
        raise ValueError("there is no one arc between opposite vectors")
    angle = cosine.clamp(-1, 1).acos()
    near = angle < 1e-6  # so near that sines are the angles themselves
    sine = torch.where(near, 1.0, angle.sin())
    weights = [torch.where(near, part, (part * angle).sin() / sine) for part in (1 - share, share)]
    length = torch.lerp(first, last, share)
    mixed = weights[0] * (length / first) * low + weights[1] * (length / last) * high
    return mixed.reshape(start.shape).to(start)

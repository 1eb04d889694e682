"""Sinusoidal embeddings of scalars."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoidal_embedding(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Features of scalars (timesteps, noise levels, sizes) in the order Stable Diffusion uses: cosines, then sines.

    values (B,) -> (B, width) float32. Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = values.float()[:, None] * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(features, (0, width % 2))

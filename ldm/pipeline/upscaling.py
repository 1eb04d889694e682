"""What an upscaler sees of a small picture, in training and in drawing alike.

Shapes: B batch, h and w height and width of the small picture.
"""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.schedule import upscaler
from ldm.diffusion.state import spread
from ldm.models.pixel_blocks import PixelBlocks


def noised_picture(small: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Small pictures (B, 3, h, w) under noise of their size, at levels (B,): `Conditioning.concat`."""
    alpha, sigma = upscaler().alpha_sigma(levels)
    return spread(alpha, small) * small + spread(sigma, small) * noise


def details_of(first_stage: PixelBlocks, noised: Tensor, levels: Tensor) -> PixelBlocks:
    """The first stage for what is missing in such pictures, at their brightness before the noise."""
    alpha, _ = upscaler().alpha_sigma(levels)
    return first_stage.over(noised / spread(alpha, noised))

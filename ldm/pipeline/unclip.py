"""What Stable Diffusion 2.1 unCLIP is told of a picture: its CLIP embedding, noised, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.schedule import TIMESTEPS, cosine
from ldm.errors import LdmError
from ldm.pipeline.clip import clip_pixels
from ldm.pipeline.images import read_picture
from ldm.weights.io import printable

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion


def image_vector(model: LatentDiffusion, picture: bytes, level: int, seed: int) -> Tensor:
    """A picture file's bytes -> `Conditioning.vector` (1, 2 P); see `LatentDiffusion.encode_image`."""
    if model.image is None or model.augmentor is None:
        name = printable(str(model.origin.path or "model"))
        raise LdmError(f"{name}: takes no picture to vary, expected an SD 2.1 unCLIP checkpoint; use another one")
    if not 0 <= level < TIMESTEPS:
        raise LdmError(f"noise level: found {level}, expected 0 to {TIMESTEPS - 1}")
    weight = model.image.proj
    pixels = clip_pixels(read_picture(picture), model.image.config).to(weight)
    embedding = model.image(pixels)
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    levels = torch.tensor([level], device=weight.device)
    return model.augmentor(embedding, noise, levels, *cosine().alpha_sigma(levels))

"""What Stable Diffusion 2.1 unCLIP is told of a picture: its CLIP embedding, noised, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.schedule import TIMESTEPS, cosine
from ldm.errors import LdmError
from ldm.pipeline.images import read_picture
from ldm.weights.io import printable

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours of the pictures that CLIP was trained on; its towers are shown pictures brought to 0 and 1."""


MAX_RATIO = 32


def image_vector(model: LatentDiffusion, picture: bytes, level: int, seed: int) -> Tensor:
    """A picture file's bytes -> `Conditioning.vector` (1, 2 P); see `LatentDiffusion.encode_image`."""
    if model.image is None or model.augmentor is None:
        name = printable(str(model.origin.path or "model"))
        raise LdmError(f"{name}: takes no picture to vary, expected an SD 2.1 unCLIP checkpoint; use another one")
    if not 0 <= level < TIMESTEPS:
        raise LdmError(f"noise level: found {level}, expected 0 to {TIMESTEPS - 1}")
    weight = model.image.proj
    pixels = clip_pixels(read_picture(picture), model.image.config.size).to(weight)
    embedding = model.image(pixels)
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    levels = torch.tensor([level], device=weight.device)
    return model.augmentor(embedding, noise, levels, *cosine().alpha_sigma(levels))


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """A picture as CLIP's image towers are shown it: (1, 3, size, size), its middle square, in their range of colours.

    Radford et al. 2021 (the released code): bicubic, the shorter side to `size`, then cut.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_RATIO * short:
        raise LdmError(f"image: found {width}x{height}, expected sides of at most 1:{MAX_RATIO}; cut it")
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None]

"""The image tower of CLIP: a vision transformer, with the tensor names of OpenCLIP and of OpenAI's files.

Dosovitskiy et al. 2021 (the transformer over patches), Radford et al. 2021, section 2.4 (CLIP's), Cherti et al. 2022.
Shapes: B batch, S side of the picture in pixels, N = (S / patch)^2 + 1 tokens, D width, P width of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.models.text_encoder import OpenCLIPTransformer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours, in [0, 1], of the pictures that OpenAI's CLIP was trained on."""


@dataclass(frozen=True)
class ImageConfig:
    """Widths of an image tower, and how pictures are brought to it.

    size: S; patch: the side of a patch in pixels; projection: P; mean, deviation: of each colour in [0, 1], by which
    pictures are brought to 0 and 1; resample: how they are shrunk, "box" by the mean of each cell.
    """

    width: int = 1280
    layers: int = 32
    heads: int = 16
    projection: int = 1024
    patch: int = 14
    size: int = 224
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    mean: tuple[float, ...] = CLIP_MEAN
    deviation: tuple[float, ...] = CLIP_DEVIATION
    resample: Literal["bicubic", "box"] = "bicubic"

    @property
    def tokens(self) -> int:
        """N: the patches, and one before them that stands for the whole picture."""
        return (self.size // self.patch) ** 2 + 1


class ImageTower(nn.Module):
    """A picture -> its vector in the space that CLIP's texts share.

    Tensor names: conv1, class_embedding, positional_embedding, ln_pre, transformer, ln_post, proj.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
        self.positional_embedding = nn.Parameter(torch.empty(config.tokens, width).normal_(std=width**-0.5))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenCLIPTransformer(width, config.layers, config.heads, config.activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.projection).normal_(std=width**-0.5))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) as `ldm.pipeline.clip.model.clip_pixels` makes them -> (B, P), not normalised."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([whole, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj

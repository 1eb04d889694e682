"""A first stage without a network: blocks of f x f pixels become channels, for models of pixels and not of latents.

An upsampler draws no picture but what it adds to the small one, enlarged (Li et al. 2021, SRDiff): colours and large
shapes are there already, and every noise level is about details. Shi et al. 2016, section 2.2, for the blocks.
Shapes: B batch, H and W picture height and width, f side of a block, z = 3 f^2 channels.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig


class PixelBlocks(nn.Module):
    """Pictures in [-1, 1], less what is known of them, to latents of about unit variance and back, exactly.

    deviation: (z,), of each channel over the pictures; the one thing of it that lies in a file
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.deviation = nn.Parameter(torch.ones(config.latent_channels), requires_grad=False)
        self._known: Tensor | None = None

    def over(self, small: Tensor) -> PixelBlocks:
        """The same for pictures that look like these, (B, 3, H / f, W / f) in [-1, 1], in small: their details."""
        details = PixelBlocks(self.config)
        details.deviation = self.deviation
        # "antialias" for the cubic that keeps slopes (Keys 1981, a = -1/2); without it torch takes another one.
        size = [side * self.config.downsampling for side in small.shape[2:]]
        details._known = F.interpolate(small.float(), size=size, mode="bicubic", antialias=True)
        return details

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), H and W multiples of f -> (B, z, H / f, W / f)."""
        details = images if self._known is None else images - self._known
        return F.pixel_unshuffle(details, self.config.downsampling) / self.deviation[:, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, z, h, w) -> images (B, 3, h f, w f), about [-1, 1]; not clamped."""
        details = F.pixel_shuffle(latents * self.deviation[:, None, None], self.config.downsampling)
        return details if self._known is None else details + self._known


FirstStage: TypeAlias = AutoencoderKL | PixelBlocks | TinyAutoencoder


def first_stage(config: AutoencoderConfig | TinyAutoencoderConfig) -> FirstStage:
    """What stands between pictures and latents in a system."""
    if isinstance(config, TinyAutoencoderConfig):
        return TinyAutoencoder(config)
    return AutoencoderKL(config) if config.base_channels else PixelBlocks(config)

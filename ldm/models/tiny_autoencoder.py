"""A tiny first stage that was taught to do what Stable Diffusion's does: for previews, and for decoding in little time.

TAESD, by Ollin Boer Bohan (https://github.com/madebyollin/taesd): 1.2 million parameters in each half, where the
original has 34 and 49, no norms and no attention. Tensor names as there: each half is one sequence of numbered layers.
Shapes: B batch, H and W picture height and width, f downsampling factor, z latent channels, C channels inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout

LARGEST = 3.0
"""Latents are brought smoothly between this and its negative before they are decoded: few are beyond it."""


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Widths of a tiny first stage. The defaults are those of TAESD for SD and SDXL, which have the same shapes.

    blocks: at each resolution, finest first; the decoder has the same
    encoder: whether there is one; latents alone can be decoded without
    """

    channels: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    latent_channels: int = 4
    encoder: bool = True

    @property
    def downsampling(self) -> int:
        """f: picture side over latent side."""
        return 2 ** (len(self.blocks) - 1)


class Clamp(nn.Module):
    """Keeps latents between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return torch.tanh(x / LARGEST) * LARGEST


class Block(nn.Module):
    """Three 3x3 convolutions beside a skip, and a ReLU behind both. Tensor names: conv.{0,2,4}."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            convolution(channels, channels),
            nn.ReLU(),
            convolution(channels, channels),
            nn.ReLU(),
            convolution(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return torch.relu(self.conv(x) + x)


class TinyAutoencoder(nn.Module):
    """Pictures in [-1, 1] to latents as the U-Net sees them and back; it was taught their scale, so it applies none.

    Tensor names: encoder.N, decoder.N.
    """

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder_of(config) if config.encoder else None
        self.decoder = decoder_of(config)

    def checked_encoder(self) -> nn.Sequential:
        """The encoder. Raises `LdmError` where there is a decoder alone."""
        if self.encoder is None:
            raise LdmError(
                "autoencoder: this tiny one is a decoder without its encoder, and a picture is to be encoded; put the"
                " encoder's file beside it, or take another --vae"
            )
        return self.encoder

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], H and W multiples of f -> scaled latents (B, z, H / f, W / f).

        Raises `LdmError` where there is a decoder alone.
        """
        return self.checked_encoder()((fastest_layout(images) + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, z, h, w) -> images (B, 3, h f, w f), about [-1, 1]; not clamped."""
        return self.decoder(fastest_layout(latents)) * 2 - 1


def encoder_of(config: TinyAutoencoderConfig) -> nn.Sequential:
    """Pictures in [0, 1], (B, 3, H, W), to latents, (B, z, H / f, W / f)."""
    layers: list[nn.Module] = [convolution(3, config.channels)]
    for level, blocks in enumerate(config.blocks):
        if level > 0:
            layers.append(convolution(config.channels, config.channels, stride=2, bias=False))
        layers.extend(Block(config.channels) for _ in range(blocks))
    return nn.Sequential(*layers, convolution(config.channels, config.latent_channels))


def decoder_of(config: TinyAutoencoderConfig) -> nn.Sequential:
    """Latents, (B, z, h, w), to pictures about [0, 1], (B, 3, h f, w f)."""
    layers: list[nn.Module] = [Clamp(), convolution(config.latent_channels, config.channels), nn.ReLU()]
    for level in reversed(range(len(config.blocks))):
        layers.extend(Block(config.channels) for _ in range(config.blocks[level]))
        if level > 0:
            layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
            layers.append(convolution(config.channels, config.channels, bias=False))
    return nn.Sequential(*layers, convolution(config.channels, 3))


def convolution(channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """3x3, that keeps the size, or divides it by `stride`."""
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=bias)

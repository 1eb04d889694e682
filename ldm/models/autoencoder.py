"""The first stage: a convolutional autoencoder with a Gaussian latent (KL-regularised VAE).

Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021 for the blocks. Tensor names as in LDM.
Shapes: B batch, H and W picture height and width, f downsampling factor, z latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers.attention import attend
from ldm.layers.convolution import fastest_layout


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths of a first stage. The defaults are Stable Diffusion's: 8 times smaller, 4 latent channels.

    base_channels: 0 for a first stage without a network (`ldm.models.pixel_blocks`), of 3 f^2 latent channels.
    scale_factor multiplies latents so that their variance is about 1; shift_factor is subtracted before that.
    norm_groups: Stable Diffusion has 32; a thin first level wants fewer, since one channel a group
    normalises each colour channel's mean away.
    """

    base_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    norm_groups: int = 32
    scale_factor: float = 0.18215
    shift_factor: float = 0.0

    @property
    def downsampling(self) -> int:
        """f: picture side over latent side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution over latents with independent entries: mean and log variance, (B, z, H/f, W/f)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + standard deviation * noise; the noise is drawn on the generator's device in float32."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def mode(self) -> Tensor:
        """The most likely latent."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over the entries: (B,). Kingma & Welling 2014, appendix B."""
        per_entry = self.mean**2 + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * per_entry.flatten(1).sum(dim=1)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip. Tensor names: norm1, conv1, norm2, conv2, nin_shortcut."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, out_channels, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.nin_shortcut(x) + hidden


class SelfAttention(nn.Module):
    """One-head attention over all pixels, in the middle of both halves. Tensor names: norm, q, k, v, proj_out."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        normed = self.norm(x)
        q, k, v = (proj(normed).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v, heads=1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution. Tensor names: block_1, attn_1, block_2."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = SelfAttention(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve the size; padded on the right and bottom only, as the published weights expect. Tensor name: conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest neighbour, then convolve. Tensor name: conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class EncoderLevel(nn.Module):
    """The encoder's blocks at one resolution. Tensor names: block.N, downsample."""

    def __init__(self, channels: int, out_channels: int, blocks: int, groups: int, downsample: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, out_channels, h or h / 2, w or w / 2)."""
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class DecoderLevel(nn.Module):
    """The decoder's blocks at one resolution, one more than the encoder's. Tensor names: block.N, upsample."""

    def __init__(self, channels: int, out_channels: int, blocks: int, groups: int, upsample: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks + 1)
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, out_channels, h or 2 h, w or 2 w)."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Encoder(nn.Module):
    """Picture to moments of the latent, before `quant_conv`. Tensor names: conv_in, down.N, mid, norm_out, conv_out."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        base, groups, mults = config.base_channels, config.norm_groups, config.channel_mult
        widths = [base] + [base * m for m in mults]
        self.conv_in = nn.Conv2d(config.image_channels, base, 3, padding=1)
        self.down = nn.ModuleList(
            EncoderLevel(widths[i], widths[i + 1], config.res_blocks, groups, downsample=i < len(mults) - 1)
            for i in range(len(mults))
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 z, H / f, W / f)."""
        hidden = self.conv_in(fastest_layout(x))
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Latent, after `post_quant_conv`, to picture. Tensor names: conv_in, mid, up.N, norm_out, conv_out.

    `up` is numbered by resolution, finest first, as on disk; it is run from the last to the first.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.base_channels * m for m in config.channel_mult]
        came_from = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            DecoderLevel(came_from[i], widths[i], config.res_blocks, groups, upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z, h, w) -> (B, 3, h f, w f)."""
        hidden = self.mid(self.conv_in(fastest_layout(z)))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class AutoencoderKL(nn.Module):
    """Pictures in [-1, 1] to latents of about unit variance and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """images (B, 3, H, W) in [-1, 1], H and W multiples of f -> the unscaled latent's distribution."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return DiagonalGaussian(mean, log_variance.clamp(-30.0, 20.0))

    def reconstruct(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, z, h, w) -> images (B, 3, h f, w f), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> scaled latents; the mode, or a sample where a generator is given."""
        posterior = self.posterior(images)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return (z - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, z, h, w) -> images (B, 3, h f, w f), about [-1, 1]; not clamped."""
        return self.reconstruct(latents / self.config.scale_factor + self.config.shift_factor)

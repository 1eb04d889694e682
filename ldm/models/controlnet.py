"""ControlNet: a copy of a U-Net's contracting half that looks at a picture and tells the U-Net what to add.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models". Tensor names as in the original code.
Shapes: B batch, C channels, h and w latent height and width, H and W picture height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ldm.models.unet import Contracting, UNetConfig
from ldm.types import Conditioning


@dataclass(frozen=True)
class ControlNetConfig:
    """A control network's widths.

    unet:          of the U-Net that it was copied from; its out_channels mean nothing here
    hint_channels: of the picture that it looks at
    hint_widths:   of the convolutions over that picture; each but the first halves its size
    pooled:        residuals are averaged over the picture, so that only its style is taken ("shuffle")
    """

    unet: UNetConfig
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    pooled: bool = False

    @classmethod
    def usual(cls, unet: UNetConfig, downsampling: int) -> ControlNetConfig:
        """As they are mostly made. downsampling: of the latents, a power of 2 of at most 16"""
        return cls(unet=unet, hint_widths=(16, 32, 96, 256, 256)[: downsampling.bit_length()])

    @property
    def downsampling(self) -> int:
        """How many pixels of the picture stand for one of the latent, along each side."""
        return 2 ** (len(self.hint_widths) - 1)


class ControlNet(Contracting):
    """Noisy latent, timestep, conditioning and a picture to the residuals of `Conditioning.control`.

    Its last convolutions start at zero, so that a new one changes nothing.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.config = config
        self.input_hint_block = _hint_block(config)
        self.zero_convs = nn.ModuleList(nn.Sequential(_zero(nn.Conv2d(width, width, 1))) for width in self.skips)
        self.middle_block_out = nn.Sequential(_zero(nn.Conv2d(self.skips[-1], self.skips[-1], 1)))

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning, hint: Tensor) -> tuple[Tensor, ...]:
        """x (B, C, h, w), timestep (B,), cond, hint (1 or B, hint_channels, H, W) in [0, 1] -> a residual for each skip
        of the U-Net, (B, C_i, h_i, w_i), finest first, and one for its middle.

        H and W are h and w times `config.downsampling`. The channels of `cond.concat` are looked at only if the network
        has room for them: one made for text to image also serves an inpainting model. Raises ValueError where `cond`
        lacks a part that it was built for.
        """
        if x.shape[1] == self.config.unet.in_channels:
            cond = cond.with_(concat=None)
        _, skips, middle = self.contract(x, timestep, cond, self.input_hint_block(hint))
        residuals = [zero(skip) for zero, skip in zip(self.zero_convs, skips, strict=True)]
        residuals.append(self.middle_block_out(middle))
        if self.config.pooled:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return tuple(residuals)


def _hint_block(config: ControlNetConfig) -> nn.Sequential:
    """Picture to features of the latent's size: at each width one convolution, then one that halves the size."""
    widths = config.hint_widths
    parts: list[nn.Module] = [nn.Conv2d(config.hint_channels, widths[0], 3, padding=1), nn.SiLU()]
    for width, wider in pairwise(widths):
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        parts += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*parts, _zero(nn.Conv2d(widths[-1], config.unet.model_channels, 3, padding=1)))


def _zero(convolution: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, its weights zero."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution

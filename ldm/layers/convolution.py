"""The U-Net's convolutional parts: residual block, downsampling, upsampling.

Shapes: B batch, C channels, h and w height and width, E width of the time embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers import cpu_products


def fastest_layout(x: Tensor, device: torch.device | None = None) -> Tensor:
    """Pictures or a convolution's weight, (B, C, h, w), in the memory format that their dtype is convolved fastest in.

    device: where they are to be convolved; None: where they are

    Channels-last in half precision: twice as fast on a CPU, and what tensor cores take. Convolutions hand the format
    on; a weight in another one is copied at each call. In float32 the weights alone that a CPU may multiply plainly
    (`cpu_products`). Everything else, and what has other than four dimensions: as it is.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    multiplied = x.dtype is torch.float32 and (device or x.device).type == "cpu" and cpu_products.may_be_product(x)
    last = x.dim() == 4 and (half or multiplied)
    return x.contiguous(memory_format=torch.channels_last) if last else x


class Convolution(nn.Conv2d):
    """PyTorch's, by the kernel that is fastest for its size."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w')."""
        keeps_size = (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        weight = self.weight  # once, for some layers make it anew
        if keeps_size and cpu_products.product_wins(input, weight):
            return cpu_products.convolve_by_product(input, weight, self.bias)
        return self._conv_forward(input, weight, self.bias)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, around a skip.

    Ho et al. 2020, appendix B. Tensor names: in_layers.{0,2}, emb_layers.1, out_layers.{0,3}, skip_connection.
    """

    def __init__(self, channels: int, out_channels: int, embedding_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), Convolution(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            Convolution(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, h, w), embedding (B, E) -> (B, out_channels, h, w)."""
        hidden = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution. Tensor name: op."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to a given size, then a convolution. Tensor name: conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C, *size). The size is the skip's, which is odd where a level had an odd size."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))

"""The text-conditioned transformer that sits between the convolutions of the U-Net.

Shapes: B batch, N = h * w positions, C channels, M text tokens, D text width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers.attention import CrossAttention
from ldm.layers.token_merging import Merging, match
from ldm.types import Context


class GEGLU(nn.Module):
    """x W1 * gelu(x W2): a gated linear unit (Shazeer 2020). Tensor name: proj."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, 2 * width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width_in) -> (B, N, width_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The position-wise network, four times as wide inside. Tensor names: net.0.proj, net.2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised first and added.

    With `cross_only` the first attention also looks at the text (the x4 upscaler's outer levels).
    """

    def __init__(self, width: int, context_width: int, heads: int, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(width, context_width if cross_only else None, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, context: Tensor | Context, perturbed: Tensor | None = None, merging: Merging | None = None
    ) -> Tensor:
        """x (B, N, width), context (B, M, D), rows (B,) of perturbed self-attention -> (B, N, width).

        merging: of tokens, for the first attention
        """
        first = context if self.cross_only else None
        if merging is None:
            x = x + self.attn1(self.norm1(x), first, perturbed)
        else:
            matching = match(x, merging)
            x = x + matching.part(self.attn1(matching.merge(self.norm1(x)), first, perturbed))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around them all.

    `linear` chooses linear projections (SD 2.x, SDXL) over 1x1 convolutions (SD 1.x): the same
    map, but the tensors on disk differ in rank. `merged` is the share of tokens that self-attention merges.
    """

    def __init__(
        self, channels: int, context_width: int, heads: int, depth: int, *, linear: bool, cross_only: bool = False
    ) -> None:
        super().__init__()
        self.linear, self.merged = linear, 0.0
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | Context, perturbed: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), context (B, M, D), rows (B,) of perturbed self-attention -> (B, C, h, w)."""
        b, c, h, w = x.shape
        hidden = self.norm(x)
        if self.linear:
            hidden = self.proj_in(hidden.flatten(2).transpose(1, 2))
        else:
            hidden = self.proj_in(hidden).flatten(2).transpose(1, 2)
        merging = Merging(h, w, self.merged) if self.merged else None
        for block in self.transformer_blocks:
            hidden = block(hidden, context, perturbed, merging)
        if self.linear:
            return x + self.proj_out(hidden).transpose(1, 2).reshape(b, c, h, w)
        return x + self.proj_out(hidden.transpose(1, 2).reshape(b, c, h, w))

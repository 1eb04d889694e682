"""What a CLIP image embedding says to a U-Net beside the text: tokens of its own for cross-attention.

Ramesh et al. 2022, section 2.1: the embedding is added to the time embedding, through `Conditioning.vector`, and is
projected into four more tokens behind those of the text.
Shapes: B batch, P width of the embedding, K tokens, D width of the text states.
"""

from __future__ import annotations

from torch import Tensor, nn


class ImageTokens(nn.Module):
    """The noised embedding and its level, as `NoiseAugmentor` joins them, -> K tokens by a linear map.

    Of no picture, all zeros, they are the map's bias: tokens that the U-Net has learned to pay no heed to.
    Tensor names: proj.weight (K D, 2 P), proj.bias (K D,).
    """

    def __init__(self, embedding: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(2 * embedding, tokens * width)

    def forward(self, seen: Tensor) -> Tensor:
        """seen (B, 2 P) -> (B, K, D)."""
        return self.proj(seen).unflatten(-1, (self.tokens, -1))

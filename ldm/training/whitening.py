"""What a text tower says made easy to learn from, and the U-Net that learned so made to take it as it is.

A text tower says most of what it says along few directions: of ours, ten of 192 carry nine tenths of the variance
(colours, styles), while what tells one noun from another is a hundredth as large. Adam moves all weights at one rate,
so that a network on top of it learns nouns a hundred times later. Whitened states have about unit deviation in every
direction. Keys, values and the vector's projection are linear in them, so the change goes into the weights afterwards,
exactly.

D: text width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ldm.layers.attention import CrossAttention
from ldm.models.unet import UNet

FLOOR = 0.05
"""A direction of deviation d is scaled by 1 / (d + FLOOR), so that rounding is not blown up where little else is."""


@dataclass(frozen=True)
class Whitening:
    """white = (states - mean) @ matrix, of mean (D,) and symmetric matrix (D, D), float32."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """States (..., D) -> white ones."""
        return (states - self.mean) @ self.matrix

    def to(self, like: Tensor) -> Whitening:
        """The same on a tensor's device, in its dtype."""
        return Whitening(self.mean.to(like), self.matrix.to(like))


def whitening_of(states: Tensor) -> Whitening:
    """The whitening of states (M, D) by the eigenvectors of their covariance (ZCA; Kessy et al. 2018)."""
    states = states.double()
    mean = states.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov((states - mean).T))
    scale = 1 / (variance.clamp(min=0).sqrt() + FLOOR)
    return Whitening(mean.float(), (directions * scale @ directions.T).float())


@dataclass(frozen=True)
class TextWhitening:
    """Of the text states, and of the pooled vector where the U-Net takes one: the first part of its vector."""

    states: Whitening
    pooled: Whitening

    def to(self, like: Tensor) -> TextWhitening:
        """The same on a tensor's device, in its dtype."""
        return TextWhitening(self.states.to(like), self.pooled.to(like))


@torch.no_grad()
def fold(unet: UNet, whitening: TextWhitening) -> None:
    """Turn a U-Net that was trained on white text into the same one on plain text, in place.

    Keys: the mean adds the same to every token's score, which softmax forgets. Values: the weights of attention add
    up to 1, so that the mean's value is a constant, which goes into the output's bias.
    """
    whitening = whitening.to(next(unet.parameters()))
    for layer in _cross_attentions(unet):
        layer.to_k.weight.copy_(layer.to_k.weight @ whitening.states.matrix)
        layer.to_v.weight.copy_(layer.to_v.weight @ whitening.states.matrix)
        _shift(cast(nn.Linear, layer.to_out[0]), -layer.to_v.weight @ whitening.states.mean)
    for layer in _vector_projections(unet):
        text = layer.weight[:, : len(whitening.pooled.mean)]
        text.copy_(text @ whitening.pooled.matrix)
        layer.bias.sub_(text @ whitening.pooled.mean)


@torch.no_grad()
def unfold(unet: UNet, whitening: TextWhitening) -> None:
    """The way back from `fold`, to train a finished U-Net on white text."""
    whitening = whitening.to(next(unet.parameters()))
    inverse = torch.linalg.inv(whitening.states.matrix.double()).to(whitening.states.matrix)
    for layer in _cross_attentions(unet):
        _shift(cast(nn.Linear, layer.to_out[0]), layer.to_v.weight @ whitening.states.mean)
        layer.to_k.weight.copy_(layer.to_k.weight @ inverse)
        layer.to_v.weight.copy_(layer.to_v.weight @ inverse)
    inverse = torch.linalg.inv(whitening.pooled.matrix.double()).to(whitening.pooled.matrix)
    for layer in _vector_projections(unet):
        text = layer.weight[:, : len(whitening.pooled.mean)]
        layer.bias.add_(text @ whitening.pooled.mean)
        text.copy_(text @ inverse)


@contextlib.contextmanager
def folded(unet: UNet, whitening: TextWhitening) -> Iterator[UNet]:
    """The U-Net folded for a while, and bit for bit what it was afterwards."""
    touched = (".attn2.", "label_emb.")
    kept = {name: t.clone() for name, t in unet.state_dict().items() if any(part in name for part in touched)}
    fold(unet, whitening)
    try:
        yield unet
    finally:
        unet.load_state_dict(unet.state_dict() | kept)


def _shift(output: nn.Linear, values: Tensor) -> None:
    """Have an attention's output layer answer as if `values` were added to the value of every token."""
    output.bias.add_(output.weight @ values)


def _cross_attentions(unet: UNet) -> list[CrossAttention]:
    """The layers that look at the text states."""
    named = unet.named_modules()
    return [layer for name, layer in named if name.endswith(".attn2") and isinstance(layer, CrossAttention)]


def _vector_projections(unet: UNet) -> list[nn.Linear]:
    """The layer that looks at the vector, if there is one."""
    if unet.config.vector_width is None:
        return []
    return [layer for name, layer in unet.named_modules() if name == "label_emb.0.0" and isinstance(layer, nn.Linear)]

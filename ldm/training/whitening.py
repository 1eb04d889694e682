"""Text states made easy to learn from, and the U-Net that learned so made to take them as they are.

A text tower says most of what it says along few directions: of ours, ten of 192 carry nine tenths of the variance
(colours, styles), while what tells one noun from another is a hundredth as large. Adam moves all weights at one rate,
so that a network on top of it learns nouns a hundred times later. Whitened states have about unit deviation in every
direction. As keys and values are linear in the states, the change goes into the weights afterwards, exactly.

D: text width, N: tokens.
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


def whitening_of(states: Tensor) -> Whitening:
    """The whitening of states (M, D) by the eigenvectors of their covariance (ZCA; Kessy et al. 2018)."""
    states = states.double()
    mean = states.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov((states - mean).T))
    scale = 1 / (variance.clamp(min=0).sqrt() + FLOOR)
    return Whitening(mean.float(), (directions * scale @ directions.T).float())


@torch.no_grad()
def fold(unet: UNet, whitening: Whitening) -> None:
    """Turn a U-Net that was trained on white states into the same one on plain states, in place.

    Keys: the mean adds the same to every token's score, which softmax forgets. Values: the weights of attention add
    up to 1, so that the mean's value is a constant, which goes into the output's bias.
    """
    for layer in _cross_attentions(unet):
        layer.to_k.weight.copy_(layer.to_k.weight @ whitening.matrix)
        layer.to_v.weight.copy_(layer.to_v.weight @ whitening.matrix)
        _shift(layer, -layer.to_v.weight @ whitening.mean)


@torch.no_grad()
def unfold(unet: UNet, whitening: Whitening) -> None:
    """The way back from `fold`, to train a finished U-Net on white states."""
    inverse = torch.linalg.inv(whitening.matrix.double()).to(whitening.matrix)
    for layer in _cross_attentions(unet):
        _shift(layer, layer.to_v.weight @ whitening.mean)
        layer.to_k.weight.copy_(layer.to_k.weight @ inverse)
        layer.to_v.weight.copy_(layer.to_v.weight @ inverse)


@contextlib.contextmanager
def folded(unet: UNet, whitening: Whitening) -> Iterator[UNet]:
    """The U-Net folded for a while, and bit for bit what it was afterwards."""
    kept = {name: tensor.clone() for name, tensor in unet.state_dict().items() if ".attn2." in name}
    fold(unet, whitening)
    try:
        yield unet
    finally:
        unet.load_state_dict(unet.state_dict() | kept)


def _shift(layer: CrossAttention, values: Tensor) -> None:
    """Have the layer answer as if `values` were added to the value of every token."""
    output = cast(nn.Linear, layer.to_out[0])
    output.bias.add_(output.weight @ values)


def _cross_attentions(unet: UNet) -> list[CrossAttention]:
    """The layers that look at the text."""
    named = unet.named_modules()
    return [layer for name, layer in named if name.endswith(".attn2") and isinstance(layer, CrossAttention)]

"""Weights that are kept as whole numbers of a byte and a scale for each row, and are computed with as before.

    w = scale * codes,  codes in -127..127,  scale = max |w| / 127 of each output channel

That is symmetric quantization per channel (Nagel et al. 2021, "A White Paper on Neural Network Quantization", section
2.2.3), of weights alone. It takes half the memory of half precision; a row of normal weights is off by about 0.9 % of
its size. A layer makes its weight when it is called and forgets it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.layers.convolution import Convolution

Store = Literal["full", "int8"]
"""How a U-Net keeps the weights of its blocks: as they are computed with, or in bytes."""

LARGEST = 127
FEW = 2**12
"""Weights of fewer numbers stay as they are."""


class InBytes(nn.Module):
    """What every layer with such a weight is besides. Tensor names: codes (D, ...) int8, scale (D, 1, ...)."""

    codes: nn.Parameter
    scale: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, made anew, in the dtype of the scale."""
        return made_of(self.codes, self.scale)


class LinearInBytes(InBytes, nn.Linear):
    """A matrix."""


class ConvolutionInBytes(InBytes, Convolution):
    """A convolution by the fastest kernel."""


class PlainConvolutionInBytes(InBytes, nn.Conv2d):
    """A convolution."""


KINDS: dict[type[nn.Module], type[InBytes]] = {
    nn.Linear: LinearInBytes,
    Convolution: ConvolutionInBytes,
    nn.Conv2d: PlainConvolutionInBytes,
}


def in_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (D, ...) -> its codes, in its memory format, and its scale, (D, 1, ...) in its dtype."""
    rows = tuple(range(1, weight.dim()))
    scale = (weight.float().abs().amax(dim=rows, keepdim=True) / LARGEST).to(weight.dtype)
    steps = torch.where(scale == 0, 1, scale).float()  # in the dtype that it is multiplied with again
    return (weight.float() / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def made_of(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight of these codes and this scale."""
    return codes.to(scale.dtype).mul_(scale)


def keep_in_bytes(blocks: Iterable[nn.Module]) -> None:
    """Turn the layers of blocks with large weights into such that keep them in bytes; in place."""
    for block in blocks:
        for layer in block.modules():
            kind = KINDS.get(type(layer))
            if kind is not None and (weight := layer.get_parameter("weight")).numel() >= FEW:
                codes, scale = in_bytes(weight.detach())
                del layer.weight
                layer.__class__ = kind
                layer.codes = nn.Parameter(codes, requires_grad=False)
                layer.scale = nn.Parameter(scale, requires_grad=False)


def layers_in_bytes(network: nn.Module) -> Iterator[tuple[str, InBytes]]:
    """Those layers of a network, by name."""
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, InBytes))


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's `state_dict`, with the weights of such layers as they are computed with."""
    state = network.state_dict()
    for name, _ in layers_in_bytes(network):
        codes, scale = state.pop(f"{name}.codes"), state.pop(f"{name}.scale")
        state[f"{name}.weight"] = made_of(codes, scale)
    return state

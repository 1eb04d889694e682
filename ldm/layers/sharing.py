"""Copies of networks that hold no tensor of their own, or hold them on another device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def shared_copy(network: Network) -> Network:
    """A network of the same modules that shares every parameter and buffer with the one given."""
    return copy_with(network, {})


def copy_with(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """The same, but with these tensors, which take no gradient, in place of the parameters of their names."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in weights_of(network)}
    for name, tensor in tensors.items():
        kept[id(network.get_parameter(name))] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(network, kept)  # which copies nothing that it finds in `kept`


def copy_on(network: Network, device: torch.device) -> Network:
    """A network of the same modules with a copy of every parameter and buffer on `device`; the copies take no gradient.

    From pinned memory to a GPU the copies are only begun here; what is computed with them waits for them by itself.
    """
    copies: dict[int, Any] = {id(tensor): _on(tensor, device) for tensor in weights_of(network)}
    return copy.deepcopy(network, copies)


def weights_of(network: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, once."""
    return [*network.parameters(), *network.buffers()]


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device, non_blocking=True, copy=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved

"""Copies of networks that hold no tensor of their own."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def shared_copy(network: Network) -> Network:
    """A network of the same modules that shares every parameter and buffer with the one given."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    return copy.deepcopy(network, kept)  # which copies nothing that it finds in `kept`

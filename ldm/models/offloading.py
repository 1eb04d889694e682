"""Networks whose weights wait in the machine's memory and are on the device that computes only while they are used.

Nothing is moved: what is on the device is a copy that goes when its last user does, so networks never change and
threads may share them. The waiting weights may be a mapped file.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.layers.attention import AttentionBlock
from ldm.layers.convolution import ResBlock
from ldm.layers.sharing import Network, copy_on, shared_copy, weights_of
from ldm.layers.transformer import TransformerBlock

Offload = Literal["none", "parts", "blocks"]
"""What of a model waits beside its device.

none:   nothing
parts:  each network while another one works: text towers, U-Net, autoencoder; the U-Net comes once for each batch
blocks: the same, and of the U-Net and its ControlNets all but the block that is computed: they come at every step
"""

Anything = TypeVar("Anything")

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
"""The fastest one first, and the one that holds least last."""

BLOCKS = (ResBlock, TransformerBlock, AttentionBlock)
"""What nearly all weights of a denoising network are in."""


def check_offload(offload: str, device: torch.device) -> None:
    """Raise LdmError for a way that is not known, or that a device has no use for."""
    if offload not in OFFLOADS:
        raise LdmError(f"offload: found {offload!r}, expected {', '.join(OFFLOADS[:-1])} or {OFFLOADS[-1]}")
    if offload != "none" and device.type != "cuda":
        name = {"cpu": "the CPU", "mps": "Apple's GPU"}.get(device.type, str(device))
        raise LdmError(f"offload {offload}: the model runs on {name}, whose memory is the machine's; leave it out")


def here(network: Anything, device: torch.device) -> Anything:
    """The network, to be run on `device`: itself where its weights are there, or it has none, else a copy that is."""
    if not isinstance(network, nn.Module) or all(is_on(tensor.device, device) for tensor in weights_of(network)):
        return network
    return copy_on(network, device)


def block_by_block(network: Network, device: torch.device) -> Network:
    """A copy of a network to be run on `device`, whose blocks are copied there one at a time, for as long as one runs.

    All but the blocks is there from the start. Raises ValueError for a network that has no such blocks.
    """
    names = [name for name, module in network.named_modules() if type(module) in BLOCKS]
    if not names:
        raise ValueError(f"{type(network).__name__} has no blocks to be run one by one")
    network = shared_copy(network)
    blocks = {name: network.get_submodule(name) for name in names}
    for name in names:
        network.set_submodule(name, nn.Identity())
    network = copy_on(network, device)
    for name, block in blocks.items():
        block.__class__ = _visiting(type(block))
        network.set_submodule(name, block)
    return network


@cache
def _visiting(plain: type[nn.Module]) -> type[nn.Module]:
    """A block's class, its `forward` on a copy of the block, on the device of what it is given first."""

    def forward(self: nn.Module, x: torch.Tensor, *others: Any) -> Any:
        return plain.forward(copy_on(self, x.device), x, *others)

    return type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that nearly all weights of a denoising network are in."""
    return [module for module in network.modules() if type(module) in BLOCKS]


def is_on(found: torch.device, device: torch.device) -> bool:
    """Whether two devices are one: "cuda" is the first GPU, as where nobody chose another."""
    return found.type == device.type and (found.index or 0) == (device.index or 0)

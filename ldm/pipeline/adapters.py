"""Adapters on a loaded model: a new model that shares every tensor which they leave alone with the old one.

The old model is not touched, so taking an adapter off is using the old one, or asking for another set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.layers.convolution import fastest_layout
from ldm.layers.sharing import Network, copy_with
from ldm.weights.adapters.apply import Use, changed, plan
from ldm.weights.adapters.read import Adapter
from ldm.weights.layout import UNET, text_prefix

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

AdapterChoice = tuple[Adapter, float] | tuple[Adapter, float, float]
"""An adapter and its weight, or its weights for the U-Net and for the text towers; 1 is as it was trained."""


@dataclass(frozen=True)
class AppliedAdapter:
    """What a picture's metadata says of an adapter: its file's name and hash, and its weights."""

    name: str
    hash: str
    unet: float
    text: float


@torch.no_grad()
def with_adapters(model: LatentDiffusion, choices: Iterable[AdapterChoice]) -> LatentDiffusion:
    """The model with these adapters, and no others; see `LatentDiffusion.with_adapters`."""
    uses = [Use(adapter, weights[0], weights[-1]) for adapter, *weights in choices]
    networks: dict[str, Any] = {UNET: model.unet}
    networks |= {text_prefix(model.config, index): tower for index, tower in enumerate(model.text)}
    tensors = {
        prefix + name: tensor for prefix, network in networks.items() for name, tensor in network.named_parameters()
    }
    tensors |= model.originals
    changes = plan(model.config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, uses)
    new = {name: tensors[name] for name in model.originals}
    new |= {name: fastest_layout(changed(tensors[name], those), model.device) for name, those in changes.items()}
    unet, *text = (_with(network, _under(new, prefix)) for prefix, network in networks.items())
    return replace(
        model,
        unet=unet,
        text=tuple(text),
        adapters=tuple(
            AppliedAdapter(use.adapter.name, use.adapter.hash, float(use.unet), float(use.text)) for use in uses
        ),
        originals={name: tensors[name] for name in changes},
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A copy of a network that holds these tensors and shares all others; the network itself where there are none."""
    return copy_with(network, tensors) if tensors else network

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
from ldm.layers.in_bytes import in_bytes, made_of
from ldm.layers.sharing import Network, copy_with
from ldm.weights.adapters.apply import Use, changed, plan
from ldm.weights.adapters.read import Adapter
from ldm.weights.layout import UNET, text_prefix

if TYPE_CHECKING:
    from ldm.pipeline.latent_diffusion import LatentDiffusion

AdapterChoice = Adapter | tuple[Adapter, float] | tuple[Adapter, float, float]
"""An adapter and its weight, or its weights for the U-Net and for the text towers; 1, or alone, as it was trained."""


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
    weighted = [(choice, 1.0) if isinstance(choice, Adapter) else choice for choice in choices]
    uses = [Use(adapter, weights[0], weights[-1]) for adapter, *weights in weighted]
    networks: dict[str, Any] = {UNET: model.unet}
    networks |= {text_prefix(model.config, index): tower for index, tower in enumerate(model.text)}
    tensors = {
        prefix + name: tensor for prefix, network in networks.items() for name, tensor in network.named_parameters()
    }
    tensors |= model.originals
    shapes = {_weight_of(name): tuple(tensor.shape) for name, tensor in tensors.items() if not _is_scale(name)}
    changes = plan(model.config, shapes, uses)
    new = {name: tensors[name] for name in model.originals}
    touched = set[str]()
    for name, those in changes.items():
        if name in tensors:
            given = {name: fastest_layout(changed(tensors[name], those), model.device)}
        else:
            codes, scale = (name.removesuffix("weight") + part for part in ("codes", "scale"))
            weight = made_of(tensors[codes], tensors[scale])
            given = dict(zip((codes, scale), in_bytes(changed(weight, those)), strict=True))
        touched |= given.keys()
        new |= given
    unet, *text = (_with(network, _under(new, prefix)) for prefix, network in networks.items())
    return replace(
        model,
        unet=unet,
        text=tuple(text),
        adapters=tuple(
            AppliedAdapter(use.adapter.name, use.adapter.hash, float(use.unet), float(use.text)) for use in uses
        ),
        originals={name: tensors[name] for name in touched},
    )


def _weight_of(name: str) -> str:
    """The name of the weight that a parameter is, or holds in bytes."""
    return name.removesuffix("codes") + "weight" if name.endswith(".codes") else name


def _is_scale(name: str) -> bool:
    """Whether a parameter says how large weights in bytes are."""
    return name.endswith(".scale")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A copy of a network that holds these tensors and shares all others; the network itself where there are none."""
    return copy_with(network, tensors) if tensors else network

"""Adapters to train: peft's layers inside of a model's U-Net and text towers, and what they have learned.

LoRA (Hu et al. 2021), LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2023) and DoRA (Liu et al. 2024), at the layers
that kohya's scripts and LyCORIS train. The layers are peft's; here is which weights of ours they stand at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.layers.attention import attend
from ldm.layers.convolution import Downsample, ResBlock, Upsample
from ldm.layers.sharing import shared_copy
from ldm.layers.transformer import SpatialTransformer
from ldm.models.presets import TextUse
from ldm.models.text_encoder import CLIPText, OpenCLIPAttention, OpenCLIPText
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.training.adapter_options import AdapterOptions
from ldm.weights.adapters.kinds import Dora, Full, Kind, Loha, Lokr, Lora, Product
from ldm.weights.adapters.names import Network, Target
from ldm.weights.layout import UNET, text_prefix

NAME = "default"
"""What peft calls the one adapter that there is."""

Layer = nn.Linear | nn.Conv2d
PeftLayer = LoraLayer | LoHaLayer | LoKrLayer


def add_adapter(model: LatentDiffusion, options: AdapterOptions, seed: int = 0) -> LatentDiffusion:
    """A model with an adapter to train, which at first changes nothing; its numbers are drawn from the seed.

    It shares every tensor with the old model, which stays as it is but for these: none of them wants a gradient any
    more. The adapter's own parameters do, the only ones of `unet` and `text` that do so, and are float32 whatever the
    model's dtype. Raises LdmError for a rank that is above a layer's smaller side, and for a model without attention
    over text, or without towers where `text_rank` is given.
    """
    unet = shared_copy(model.unet)
    layers = dict(_layers_in(unet, (SpatialTransformer,)))
    if not layers:
        raise LdmError("adapter: this model's U-Net has no attention over text to adapt; use another one")
    if options.convolutions is not None:
        layers |= dict(_layers_in(unet, (ResBlock, Downsample, Upsample)))
    if options.text_rank is not None and not model.text:
        raise LdmError("adapter: text_rank is given, but this model has no text towers; leave it away")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(unet, layers, options, options.rank)
        text = model.text
        if options.text_rank is not None:
            text = tuple(_adapted(tower, use, options) for tower, use in zip(text, model.config.text, strict=True))
    return replace(model, unet=unet, text=text)


def trained_parts(model: LatentDiffusion) -> dict[Target, Kind]:
    """What the adapter of such a model has learned, for `ldm.weights.adapters.write`: float32 on the CPU."""
    networks: list[tuple[Network, str, nn.Module]] = [("unet", UNET, model.unet)]
    for index, tower in enumerate(model.text):
        networks.append(("text", text_prefix(model.config, index), _module(tower)))
    parts: dict[Target, Kind] = {}
    for network, home, module in networks:
        fused = {path for path, inner in module.named_modules() if isinstance(inner, SplitAttention)}
        for path, layer in module.named_modules():
            if isinstance(layer, PeftLayer):
                parts[_target(network, home, path, layer, fused)] = _learned(layer)
    return parts


class SplitAttention(nn.Module):
    """OpenCLIP's attention with its one input projection as the three that it is made of, on the same numbers.

    So that q, k and v have an adapter each, as in every file.
    """

    def __init__(self, whole: OpenCLIPAttention) -> None:
        super().__init__()
        self.heads, self.causal = whole.heads, whole.causal
        weights = whole.in_proj_weight.detach().chunk(3)
        biases = whole.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = whole.out_proj

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); seen (B, N) bool: the positions that are looked at."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.heads, causal=self.causal, seen=seen))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer


def _adapted(tower: object, use: TextUse, options: AdapterOptions) -> OpenCLIPText | CLIPText:
    """A copy of a text tower with adapters in every block that is run; one behind these would learn nothing."""
    assert isinstance(tower, OpenCLIPText | CLIPText) and options.text_rank is not None
    tower = shared_copy(tower)
    if isinstance(tower, OpenCLIPText):
        for block in tower.transformer.resblocks:
            assert isinstance(block.attn, OpenCLIPAttention)
            block.attn = SplitAttention(block.attn)
    home = "transformer.resblocks" if isinstance(tower, OpenCLIPText) else "text_model.encoder.layers"
    run = use.tower.layers - (0 if use.pooled else use.skip)
    layers = {
        f"{home}.{index}.{path}": layer
        for index in range(run)
        for path, layer in tower.get_submodule(f"{home}.{index}").named_modules()
        if isinstance(layer, nn.Linear)
    }
    _inject(tower, layers, options, options.text_rank)
    return tower


def _layers_in(network: nn.Module, blocks: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Layer]]:
    """Linear layers and convolutions inside of blocks of these classes, by their paths in the network."""
    for path, block in network.named_modules():
        if isinstance(block, blocks):
            for inner, layer in block.named_modules():
                if isinstance(layer, Layer):
                    yield f"{path}.{inner}", layer


def _inject(network: nn.Module, layers: Mapping[str, Layer], options: AdapterOptions, rank: int) -> None:
    """Put peft's layers around these, and let nothing else be trained."""
    large = {path for path, layer in layers.items() if max(layer.weight.shape[2:], default=1) > 1}
    for path, layer in layers.items():
        own = (options.convolutions or rank) if path in large else rank
        if own > (side := min(layer.weight.shape[0], layer.weight[0].numel())):
            raise LdmError(f"adapter: rank is {own}, expected at most {side}, the smaller side of {path}")
    ranks = {_any_of(large): options.convolutions} if large and options.convolutions else {}
    alphas = {path: options.scale * own for path, own in ranks.items()}
    paths = _any_of(layers)
    alpha: Any = options.scale * rank  # any number will do, whatever peft's annotations say
    match options.kind:
        case "loha":
            config = LoHaConfig(
                r=rank, alpha=alpha, target_modules=paths, rank_dropout=options.dropout,
                rank_pattern=ranks, alpha_pattern=alphas,
            )  # fmt: skip
        case "lokr":
            config = LoKrConfig(
                r=rank, alpha=alpha, target_modules=paths, rank_dropout=options.dropout,
                rank_pattern=ranks, alpha_pattern=alphas,
            )  # fmt: skip
        case "lora" | "locon" | "dora":
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=paths, lora_dropout=options.dropout,
                rank_pattern=ranks, alpha_pattern=alphas, use_dora=options.kind == "dora",
            )  # fmt: skip
    inject_adapter_in_model(config, network, NAME)
    _widen(network)
    network.eval()


@torch.no_grad()
def _widen(network: nn.Module) -> None:
    """What is trained in float32, where peft gave it the base's dtype; DoRA's magnitudes afresh from the weights."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[NAME].weight
            assert isinstance(magnitude, Tensor)
            magnitude.copy_(_weight(layer).float().flatten(1).norm(dim=1).reshape(magnitude.shape))


def _any_of(paths: Mapping[str, object] | set[str]) -> str:
    """A regular expression that finds these whole paths."""
    return "|".join(map(re.escape, sorted(paths)))


def _module(tower: object) -> nn.Module:
    assert isinstance(tower, nn.Module)
    return tower


def _target(network: Network, home: str, path: str, layer: PeftLayer, fused: set[str]) -> Target:
    """Which tensor of a file a layer stands at; of an input projection that was split, which rows of it."""
    shape = tuple(_weight(layer).shape)
    around, _, name = path.rpartition(".")
    if around in fused and name != "out_proj":
        first = "qkv".index(name[0]) * shape[0]
        return Target(network, f"{home}{around}.in_proj_weight", shape, rows=(first, first + shape[0]))
    return Target(network, f"{home}{path}.weight", shape)


def _learned(layer: PeftLayer) -> Kind:
    """What a layer of peft's does to its weight."""
    scale = layer.scaling[NAME]
    if isinstance(layer, LoraLayer):
        up, down = (_plain(factor[NAME].weight) for factor in (layer.lora_B, layer.lora_A))
        lora = Lora(Product(up.flatten(1), down), scale)
        if NAME not in layer.lora_magnitude_vector:
            return lora
        return Dora(lora, _plain(layer.lora_magnitude_vector[NAME].weight).flatten(), on_input=False)
    own = {name: _plain(held[NAME]) for name, held in layer._modules.items()
           if isinstance(held, nn.ParameterDict) and NAME in held}  # fmt: skip
    if isinstance(layer, LoHaLayer):
        first, second = (Product(own[f"hada_w{n}_a"], own[f"hada_w{n}_b"]) for n in (1, 2))
        return Loha(first, second, scale)
    first, second = (
        Full(own[f"lokr_w{n}"]) if f"lokr_w{n}" in own else Product(own[f"lokr_w{n}_a"], own[f"lokr_w{n}_b"])
        for n in (1, 2)
    )
    return Lokr(first, second, scale)


def _weight(layer: PeftLayer) -> Tensor:
    """The weight that a layer of peft's stands at."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


def _plain(tensor: object) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach().float().cpu()

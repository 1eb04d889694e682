"""ControlNets from files: the original names (`control_model.*`, or bare) or diffusers', for SD 1.x, 2.x and SDXL.

What shapes do not tell (attention heads, say) is as in the U-Net that the network was copied from.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.layers.convolution import fastest_layout
from ldm.layers.in_bytes import full_state
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import TEXT_WIDTHS
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.architecture import Shapes, unet_config
from ldm.weights.io import printable
from ldm.weights.rename import controlnet_prefixes_of, renamed
from ldm.weights.source import Source, open_source, read_json, renamed_source

PREFIX = "control_model."
DIFFERENCE = "difference"
"""The tensor of a file whose weights are to be added to those of the base's U-Net."""

OTHERS: tuple[tuple[str, str], ...] = (
    ("a Control-LoRA", r"lora_controlnet|.*\.(up|down)"),
    ("a ControlNet-LLLite", r"lllite_.+"),
    ("a ControlNet-Union", r"task_embedding|control_type_proj\..+|control_add_embedding\..+"),
    ("a T2I-Adapter", r"(adapter\.)?body\.\d+\..+"),
    ("a control network of a transformer model", r"(control_model\.)?(controlnet|joint|double)_blocks\..+"),
)
"""Relatives that are not read, each with a pattern of one of its tensors' whole names."""


def read_control(
    path: str | Path,
    base: UNet | None = None,
    *,
    device: torch.device | str = "cpu",
    runs_on: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> ControlNet:
    """A ControlNet from a file, or from a folder that diffusers wrote.

    base:    the U-Net that it is to control; a file of differences is added to its weights
    device:  where it is kept; runs_on: where it is computed with, None: there

    Raises LdmError where the file is no ControlNet, where it lacks a tensor or has one too many, and where it is made
    for another U-Net.
    """
    raw = open_source(path, allow_pickle=allow_pickle)
    try:
        source = control_source(raw)
        network = _build(source, base)
        added = _base_tensors(source, base)
    except LdmError as error:
        raise LdmError(f"{printable(str(path))}: {error}") from None
    state = {}
    for name, tensor in source.read(network.state_dict()):
        whole = tensor.float() + added[name].cpu().float() if name in added else tensor
        state[name] = fastest_layout(whole.to(device=device, dtype=dtype), runs_on)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def control_source(raw: Source) -> Source:
    """The tensors of a ControlNet in LDM's bare names. Raises LdmError where there is none among these.

    A mark of differences stays; whatever else there is is left out.
    """
    for kind, pattern in OTHERS:
        if any(re.fullmatch(pattern, name) for name in raw.tensors):
            raise LdmError(f"is {kind}, which is not read; expected a whole ControlNet")
    marks = {name: name for name in raw.tensors if name == DIFFERENCE}
    if f"{PREFIX}input_hint_block.0.weight" in raw.tensors:
        names = {name.removeprefix(PREFIX): name for name in raw.tensors if name.startswith(PREFIX)}
    elif "input_hint_block.0.weight" in raw.tensors:
        names = {name: name for name in raw.tensors}
    elif "controlnet_cond_embedding.conv_in.weight" in raw.tensors:
        names = _of_diffusers(raw)
    else:
        raise LdmError("holds no ControlNet; expected control_model.*, or the names of diffusers")
    return renamed_source(raw, names | marks)


def control_config(shapes: Shapes) -> ControlNetConfig:
    """The config of a ControlNet in LDM's bare names. Raises LdmError where a tensor that must be there is not."""
    halving = next(index for index in count() if f"input_hint_block.{4 * index + 4}.weight" not in shapes)
    named = [f"input_hint_block.{index}.weight" for index in (0, *(4 * i + 4 for i in range(halving)))]
    if any(len(shapes.get(name, ())) != 4 for name in named):
        raise LdmError(f"tensor {named[0]} is missing or has not 4 sizes")
    return ControlNetConfig(
        unet=unet_config({**shapes, "out.2.weight": (4, 1, 1, 1)}),  # a control network has no way out
        hint_channels=shapes[named[0]][1],
        hint_widths=tuple(shapes[name][0] for name in named),
    )


def config_of(source: Source) -> ControlNetConfig:
    """The config of a ControlNet from `control_source`, by its shapes and by what lies beside its file."""
    shapes = {name: shape for name, shape in source.shapes.items() if name != DIFFERENCE}
    return replace(control_config(shapes), pooled=_pooled(source))


def made_for(unet: UNetConfig) -> str:
    """The family that a network with these widths belongs to, in words."""
    if unet.context_width is None:
        return "a U-Net without text"
    text = f"text {unet.context_width} wide"
    family = TEXT_WIDTHS.get(unet.context_width)
    return f"{family} ({text})" if family else f"a U-Net with {text}"


def check_base(config: ControlNetConfig, base: UNetConfig) -> None:
    """Raise LdmError that says for what a ControlNet is made where that is not this U-Net."""
    unet = config.unet
    if unet.context_width not in (None, base.context_width):
        raise LdmError(f"is made for {made_for(unet)}, the model is {made_for(base)}")
    for field, what in (
        ("model_channels", "width"),
        ("channel_mult", "widths of levels"),
        ("res_blocks", "number of residual blocks"),
        ("vector_width", "width of the vector"),
        ("classes", "number of labels"),
    ):
        found, expected = getattr(unet, field), getattr(base, field)
        if found != expected:
            raise LdmError(f"does not fit the model: its {what} is {found}, the model's {expected}")
    if unet.in_channels not in (base.out_channels, base.in_channels):
        raise LdmError(f"looks at {unet.in_channels} latent channels, the model has {base.out_channels}")
    if config.hint_channels != 3:
        raise LdmError(f"looks at a picture of {config.hint_channels} channels, expected 3")


def _build(source: Source, base: UNet | None) -> ControlNet:
    """The network on `meta`, for tensors that are known to fit. Raises LdmError where they do not."""
    config = config_of(source)
    if base is not None:
        check_base(config, base.config)
        kept = {name: getattr(base.config, name) for name in ("heads", "head_width", "cross_only")}
        config = replace(config, unet=replace(config.unet, **kept))
    with torch.device("meta"):
        network = ControlNet(config)
    _check_names(source, network)
    return network


def _base_tensors(source: Source, base: UNet | None) -> dict[str, Tensor]:
    """What is to be added to the file's tensors: nothing, but for a file of differences."""
    if DIFFERENCE not in source.tensors:
        return {}
    if base is None:
        raise LdmError("holds differences to a U-Net's weights; give the model that it is for")
    return full_state(base)


def _check_names(source: Source, network: ControlNet) -> None:
    """Raise LdmError where file and network do not have the same tensors."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = source.shapes
    misshapen = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    no_numbers = sorted(name for name in wanted.keys() & found.keys() if "F" not in source.tensors[name].dtype)
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys() - {DIFFERENCE}),
        "of another shape": misshapen,
        "not of floating-point numbers": no_numbers,
    }
    lists = [f"{len(names)} {what}, as {printable(names[0])}" for what, names in faults.items() if names]
    if lists:
        raise LdmError(f"its tensors do not fit a ControlNet for {made_for(network.config.unet)}; {'; '.join(lists)}")


def _of_diffusers(raw: Source) -> dict[str, str]:
    """Our bare name -> diffusers'. Raises LdmError for a config beside the file that means another network."""
    if _config_beside(raw).get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise LdmError("looks at pictures in BGR order, which is not supported")
    back = {theirs: ours for ours, theirs in controlnet_prefixes_of(raw.shapes).items()}
    return {renamed(name, back): name for name in raw.tensors}


def _pooled(source: Source) -> bool:
    """Whether residuals are averaged: as a config beside the file says, else where its name has "shuffle" in it."""
    told = _config_beside(source).get("global_pool_conditions")
    return told if isinstance(told, bool) else "shuffle" in source.path.stem.lower()


def _config_beside(source: Source) -> dict[str, Any]:
    """The config.json that diffusers writes beside a network's file, if it is there."""
    path = source.path.with_name("config.json")
    ours = source.path.name.startswith("diffusion_pytorch_model") and path.is_file()
    return read_json(path) if ours else {}

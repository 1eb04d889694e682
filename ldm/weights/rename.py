"""The names that diffusers and transformers give to our tensors, generated from a network's config.

Ours are those of the original single files (see `layout.py`, without its prefixes). Nearly every tensor has one name in
the other layout and the same numbers there; a `Piece` says where that is not so. The names of the U-Net and the
autoencoder differ in the first part alone, so a table of prefixes serves both directions, and the config can be read
off the other layout's names and shapes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.text_encoder import TextConfig, text_tower
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.architecture import Shapes, autoencoder_config, clip_config, unet_config
from ldm.weights.layout import unfilled

Prefixes = dict[str, str]
"""What a name of ours starts with -> what theirs starts with instead. Both sides end at a dot."""


@dataclass(frozen=True)
class Piece:
    """One tensor of ours as one or several tensors of the other layout.

    form: "same"; "rows": ours is theirs joined along the first axis, in this order; "transposed": of rank 2;
    "linear": a 1x1 convolution here is a linear layer there.
    """

    names: tuple[str, ...]
    form: Literal["same", "rows", "transposed", "linear"] = "same"


Names = dict[str, Piece]
"""Our name -> where that tensor is in the other layout."""


def join(piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
    """Our tensor from theirs, bit for bit."""
    parts = [tensors[name] for name in piece.names]
    match piece.form:
        case "rows":
            return torch.cat(parts)
        case "transposed":
            return parts[0].t().contiguous()
        case "linear":
            return parts[0][:, :, None, None]
        case "same":
            return parts[0]


def split(piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
    """Their tensors from ours, bit for bit: the inverse of `join`."""
    match piece.form:
        case "rows":
            parts = tensor.chunk(len(piece.names))
        case "transposed":
            parts = (tensor.t().contiguous(),)
        case "linear":
            parts = (tensor[:, :, 0, 0],)
        case "same":
            parts = (tensor,)
    return dict(zip(piece.names, parts, strict=True))


def joined_shape(piece: Piece, shapes: Shapes) -> tuple[int, ...]:
    """The shape that `join` gives. Raises LdmError where their tensors cannot be joined."""
    first, *others = (shapes[name] for name in piece.names)
    if piece.form in ("transposed", "linear") and len(first) != 2:
        raise LdmError(f"tensor {piece.names[0]} has shape {first}, expected 2 sizes")
    if piece.form == "rows" and not (first and all(other and other[1:] == first[1:] for other in others)):
        raise LdmError(
            f"tensors {', '.join(piece.names)} have shapes {first}, {str(others)[1:-1]} and do not fit together"
        )
    match piece.form:
        case "rows":
            return (first[0] + sum(other[0] for other in others), *first[1:])
        case "transposed":
            return first[::-1]
        case "linear":
            return (*first, 1, 1)
        case "same":
            return first


def split_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each tensor that `split` gives."""
    match piece.form:
        case "rows":
            return (shape[0] // len(piece.names), *shape[1:])
        case "transposed":
            return shape[::-1]
        case "linear":
            return shape[:2]
        case "same":
            return shape


def unet_names(config: UNetConfig, vector: str = "add_embedding") -> Names:
    """A U-Net's tensors in diffusers' UNet2DConditionModel.

    vector: where `Conditioning.vector` goes: "add_embedding" (SDXL: pooled text and sizes) or "class_embedding" (SD 2.1
    unCLIP: a picture's embedding). Raises LdmError for a U-Net without text, which diffusers has in other classes.
    """
    if config.context_width is None:
        raise LdmError("a U-Net without text has no form in diffusers' layout that is known here")
    depths = [*config.attention, config.middle_attention]
    prefixes = unet_prefixes([depth > 0 for depth in depths], config.res_blocks, vector)
    return {name: Piece((renamed(name, prefixes),)) for name in _names(lambda: UNet(config))}


def autoencoder_names(config: AutoencoderConfig) -> Names:
    """A KL autoencoder's tensors in diffusers' AutoencoderKL, whose attention is made of linear layers."""
    prefixes = autoencoder_prefixes(len(config.channel_mult), config.res_blocks)

    def piece(name: str) -> Piece:
        linear = ".attn_1." in name and ".norm." not in name and name.endswith("weight")
        return Piece((renamed(name, prefixes),), "linear" if linear else "same")

    return {name: piece(name) for name in _names(lambda: AutoencoderKL(config))}


def text_names(config: TextConfig) -> Names:
    """A text tower's tensors in transformers' CLIPTextModel(WithProjection), as on disk: under `text_model.`.

    A tower that has Hugging Face's names already maps to itself. The last block of SD 2.x, which diffusers leaves out
    with the projection, is in the map like every other.
    """
    return {
        name: _open_clip_piece(name) if config.names == "open_clip" else Piece((name,))
        for name in _names(lambda: text_tower(config))
    }


def controlnet_names(config: ControlNetConfig, vector: str = "add_embedding") -> Names:
    """A control network's tensors in diffusers' ControlNetModel; `vector` as in `unet_names`."""
    depths = [*config.unet.attention, config.unet.middle_attention]
    prefixes = unet_prefixes([depth > 0 for depth in depths], config.unet.res_blocks, vector)
    prefixes |= control_prefixes(len(config.hint_widths) - 1, len(config.unet.attention) * (config.unet.res_blocks + 1))
    return {name: Piece((renamed(name, prefixes),)) for name in _names(lambda: ControlNet(config))}


def unet_names_of(shapes: Shapes) -> Names:
    """The map for a U-Net in diffusers' names, from those: every one of its tensors is in it, also unknown ones."""
    back = _inverse(unet_prefixes_of(shapes))
    return {renamed(name, back): Piece((name,)) for name in shapes}


def autoencoder_names_of(shapes: Shapes) -> Names:
    """The map for an autoencoder in diffusers' names, of a KL one also in those that its attention had before 0.17."""
    if TINY in shapes:
        return {_tiny_name(name): Piece((name,)) for name in shapes}
    back = _inverse(autoencoder_prefixes_of(shapes))
    for half in ("encoder.", "decoder."):
        for old, ours in FORMER_ATTENTION.items():
            back[f"{half}mid_block.attentions.0.{old}"] = f"{half}mid.attn_1.{ours}"

    def piece(name: str) -> Piece:
        linear = ".attentions.0." in name and len(shapes[name]) == 2
        return Piece((name,), "linear" if linear else "same")

    return {renamed(name, back): piece(name) for name in shapes}


TINY = "decoder.layers.0.weight"
"""A tensor that tells diffusers' AutoencoderTiny."""


def _tiny_name(name: str) -> str:
    """The name of a tensor of theirs in TAESD's own layout, where the clamp of latents is the decoder's layer 0."""
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
    return f"{match[1]}.{int(match[2]) + (match[1] == 'decoder')}.{match[3]}" if match else name


def unet_config_of(shapes: Shapes) -> UNetConfig:
    """The config of a U-Net in diffusers' names; see `architecture.unet_config`."""
    return unet_config({ours: shapes[piece.names[0]] for ours, piece in unet_names_of(shapes).items()})


def autoencoder_config_of(shapes: Shapes) -> AutoencoderConfig:
    """The config of a KL autoencoder in diffusers' names; see `architecture.autoencoder_config`."""
    return autoencoder_config({ours: shapes[piece.names[0]] for ours, piece in autoencoder_names_of(shapes).items()})


def text_config_of(shapes: Shapes, names: Literal["open_clip", "hugging_face"]) -> TextConfig:
    """The config of a text tower in transformers' names, for the names that it has with us."""
    config = clip_config(shapes)
    if names == "hugging_face":
        return config
    piece = _open_clip_piece("text_projection")
    projection = joined_shape(piece, shapes)[1] if piece.names[0] in shapes else None
    return replace(config, names=names, activation="gelu", projection=projection)


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with its longest known prefix exchanged; the name itself where none is known."""
    end = len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        if (prefix := prefixes.get(name[: end + 1])) is not None:
            return prefix + name[end + 1 :]
    return name


RESNET = {
    "in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.", "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut.",
}  # fmt: skip
"""The parts of a U-Net's residual block."""


def unet_prefixes(attention: list[bool], res_blocks: int, vector: str = "add_embedding") -> Prefixes:
    """attention: whether a level has any, and at the end whether the middle has."""
    prefixes = {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
        "label_emb.": "class_embedding.",
        "label_emb.0.0.": f"{vector}.linear_1.",
        "label_emb.0.2.": f"{vector}.linear_2.",
        "input_blocks.0.0.": "conv_in.",
        "out.0.": "conv_norm_out.",
        "out.2.": "conv_out.",
    }
    *levels, middle = attention
    stages = [
        *_encoder_stages(levels, res_blocks),
        ("middle_block.", "mid_block.", 0, middle, None),
        *_decoder_stages(levels, res_blocks),
    ]
    for ours, theirs, block, attends, sampler in stages:
        prefixes |= {f"{ours}0.{part}": f"{theirs}resnets.{block}.{name}" for part, name in RESNET.items()}
        if attends:
            prefixes[f"{ours}1."] = f"{theirs}attentions.{block}."
        if sampler:
            prefixes[f"{ours}{1 + attends}.conv."] = f"{theirs}{sampler}.0.conv."
    last = f"middle_block.{1 + middle}."
    prefixes |= {f"{last}{part}": f"mid_block.resnets.1.{name}" for part, name in RESNET.items()}
    for level in range(len(levels) - 1):
        prefixes[f"input_blocks.{(level + 1) * (res_blocks + 1)}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
    return prefixes


Stage = tuple[str, str, int, bool, str | None]
"""Our prefix, theirs, the index of its residual block there, whether it attends, and their name of its upsampling."""


def _encoder_stages(levels: list[bool], res_blocks: int) -> Iterator[Stage]:
    """Every level has a stage for each residual block and, but for the last, one that halves the size."""
    for level, attends in enumerate(levels):
        for block in range(res_blocks):
            yield f"input_blocks.{level * (res_blocks + 1) + block + 1}.", f"down_blocks.{level}.", block, attends, None


def _decoder_stages(levels: list[bool], res_blocks: int) -> Iterator[Stage]:
    """Coarsest level first; the last stage of each, but for the finest, doubles the size."""
    for level, attends in enumerate(reversed(levels)):
        for block in range(res_blocks + 1):
            grows = block == res_blocks and level < len(levels) - 1
            ours = f"output_blocks.{level * (res_blocks + 1) + block}."
            yield ours, f"up_blocks.{level}.", block, attends, "upsamplers" if grows else None


def unet_prefixes_of(shapes: Shapes) -> Prefixes:
    """The table for a U-Net, or the encoder half of one, in diffusers' names."""
    levels = _count(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    blocks = _count(shapes, "down_blocks.0.resnets.{}.conv1.weight")
    attention = [f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in range(levels)]
    attention.append("mid_block.attentions.0.proj_in.weight" in shapes)
    vector = "class_embedding" if "class_embedding.linear_1.weight" in shapes else "add_embedding"
    return unet_prefixes(attention, blocks, vector)


def controlnet_prefixes_of(shapes: Shapes) -> Prefixes:
    """The table for a control network in diffusers' names. Raises LdmError where a tensor that must be there is not."""
    halvings = _count(shapes, "controlnet_cond_embedding.blocks.{}.weight") // 2
    return unet_prefixes_of(shapes) | control_prefixes(halvings, _count(shapes, "controlnet_down_blocks.{}.weight"))


def control_prefixes(halvings: int, skips: int) -> Prefixes:
    """What a control network has beside the U-Net's half.

    halvings: how often its picture's size is halved, with two convolutions each time; skips: of the U-Net.
    """
    last = 2 * halvings + 1
    prefixes = {
        "input_hint_block.0.": "controlnet_cond_embedding.conv_in.",
        f"input_hint_block.{2 * last}.": "controlnet_cond_embedding.conv_out.",
        "middle_block_out.0.": "controlnet_mid_block.",
    }
    prefixes |= {f"input_hint_block.{2 * i}.": f"controlnet_cond_embedding.blocks.{i - 1}." for i in range(1, last)}
    return prefixes | {f"zero_convs.{i}.0.": f"controlnet_down_blocks.{i}." for i in range(skips)}


AUTOENCODER_ATTENTION = {
    "norm.": "group_norm.", "q.": "to_q.", "k.": "to_k.", "v.": "to_v.", "proj_out.": "to_out.0.",
}  # fmt: skip


FORMER_ATTENTION = {"query.": "q.", "key.": "k.", "value.": "v.", "proj_attn.": "proj_out."}


def autoencoder_prefixes_of(shapes: Shapes) -> Prefixes:
    """The table for an autoencoder in diffusers' names."""
    levels = _count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return autoencoder_prefixes(levels, _count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"))


def autoencoder_prefixes(levels: int, res_blocks: int) -> Prefixes:
    """The decoder's levels are numbered by resolution with us, in the order of running with them."""
    prefixes = {}
    for half in ("encoder.", "decoder."):
        prefixes |= {
            f"{half}norm_out.": f"{half}conv_norm_out.",
            f"{half}mid.block_1.": f"{half}mid_block.resnets.0.",
            f"{half}mid.block_2.": f"{half}mid_block.resnets.1.",
        }
        for ours, theirs in AUTOENCODER_ATTENTION.items():
            prefixes[f"{half}mid.attn_1.{ours}"] = f"{half}mid_block.attentions.0.{theirs}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}.", f"decoder.up_blocks.{levels - 1 - level}."
        prefixes[f"encoder.down.{level}.downsample."] = f"{down}downsamplers.0."
        prefixes[f"decoder.up.{level}.upsample."] = f"{up}upsamplers.0."
        for block in range(res_blocks + 1):
            prefixes[f"encoder.down.{level}.block.{block}."] = f"{down}resnets.{block}."
            prefixes[f"decoder.up.{level}.block.{block}."] = f"{up}resnets.{block}."
    shortcuts = {f"{ours}nin_shortcut.": f"{theirs}conv_shortcut." for ours, theirs in prefixes.items()}
    return prefixes | {ours: theirs for ours, theirs in shortcuts.items() if ".block" in ours}


OPEN_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip


def _open_clip_piece(name: str) -> Piece:
    """OpenCLIP keeps q, k and v in one matrix, and its projection the other way round."""
    match name.split(".", 3):
        case ["transformer", "resblocks", index, part]:
            layer = f"text_model.encoder.layers.{index}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                return Piece(tuple(f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv"), "rows")
            return Piece((layer + renamed(part, OPEN_CLIP_BLOCK),))
        case ["text_projection"]:
            return Piece(("text_projection.weight",), "transposed")
        case ["positional_embedding"]:
            return Piece(("text_model.embeddings.position_embedding.weight",))
        case ["ln_final", part]:
            return Piece((f"text_model.final_layer_norm.{part}",))
        case _:
            return Piece((f"text_model.embeddings.{name}",))


def _inverse(prefixes: Prefixes) -> Prefixes:
    return {theirs: ours for ours, theirs in prefixes.items()}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of the pattern with 0, 1 ... in its place follow each other. Raises LdmError where none is there."""
    if (found := next(index for index in count() if pattern.format(index) not in shapes)) == 0:
        raise LdmError(f"tensor {pattern.format(0)} is missing")
    return found


def _names(network: Callable[[], nn.Module]) -> list[str]:
    """The names of a network's tensors."""
    return list(unfilled(network).state_dict())

"""Network configs read off tensor names and shapes, so that a model of any size loads, known or not.

Shapes do not tell the number of attention heads or of norm groups. Those follow the published models: SD 1.x and the
x4 upscaler have 8 heads, SD 2.x and SDXL heads that are 64 wide; text towers have heads that are 64 wide; norms have 32
groups. Where such a number does not divide a (tiny) model's widths, the largest one that does is taken.

Every function takes the shapes of one network, names without its prefix, and raises LdmError where a tensor that must
be there is missing or has the wrong rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import count, pairwise

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.image_encoder import ImageConfig
from ldm.models.text_encoder import TextConfig
from ldm.models.tiny_autoencoder import TinyAutoencoderConfig
from ldm.models.unet import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]


def under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose names start with the prefix, which is cut off."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def unet_config(shapes: Shapes) -> UNetConfig:
    """The config of a U-Net in LDM's names."""
    base = _size(shapes, "time_embed.0.weight", 2, 1)
    levels = _input_levels(shapes)
    widths = [_only({_size(shapes, f"{s}0.out_layers.3.weight", 4, 0) for s in stages}, "width") for stages in levels]
    depths = [_only({_depth(shapes, f"{stage}1.") for stage in stages}, "attention depth") for stages in levels]
    middle_depth = _depth(shapes, "middle_block.1.")
    first = next((stages[0] for stages, depth in zip(levels, depths, strict=True) if depth), "middle_block.")
    transformer = f"{first}1.transformer_blocks.0.attn2.to_k.weight"
    context = _size(shapes, transformer, 2, 1) if transformer in shapes else None
    linear = context is not None and len(shapes.get(f"{first}1.proj_in.weight", ())) == 2
    classes = _size(shapes, "label_emb.weight", 2, 0) if "label_emb.weight" in shapes else None
    with_heads = [width for width, depth in zip(widths, depths, strict=True) if depth]
    with_heads += [widths[-1]] if middle_depth else []
    by_width = linear and classes is None
    return UNetConfig(
        in_channels=_size(shapes, "input_blocks.0.0.weight", 4, 1),
        out_channels=_size(shapes, "out.2.weight", 4, 0),
        model_channels=base,
        channel_mult=_multiples(widths, base),
        res_blocks=_only({len(stages) for stages in levels}, "number of residual blocks"),
        attention=tuple(depths),
        middle_attention=middle_depth,
        context_width=context,
        heads=None if by_width else math.gcd(8, *with_heads),
        head_width=math.gcd(64, *with_heads) if by_width else None,
        linear_projections=linear,
        cross_only=tuple(_is_cross_only(shapes, stages[0], context) for stages in levels),
        vector_width=_size(shapes, "label_emb.0.0.weight", 2, 1) if "label_emb.0.0.weight" in shapes else None,
        classes=classes,
    )


def autoencoder_config(shapes: Shapes) -> AutoencoderConfig:
    """The config of a KL autoencoder in LDM's names, but for its latents' scale, of which shapes say nothing.

    A first stage without a network is known by its deviations, one for each channel of a block of pixels.
    """
    if "deviation" in shapes:
        channels = _size(shapes, "deviation", 1, 0)
        levels = max(0, round(math.log(channels / 3, 4)))
        return AutoencoderConfig(0, (1,) * (levels + 1), res_blocks=0, latent_channels=channels, norm_groups=1)
    if is_tiny_autoencoder(shapes):
        raise LdmError("its first stage is a tiny autoencoder; expected a KL autoencoder, as Stable Diffusion's own")
    if any(name.startswith("quantize.") for name in shapes):
        raise LdmError("its first stage has a codebook (VQ); only KL autoencoders are read")
    base = _size(shapes, "encoder.conv_in.weight", 4, 0)
    levels = range(_some(shapes, "encoder.down.", ".block.0.conv1.weight"))
    widths = [_size(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4, 0) for level in levels]
    blocks = {_count(shapes, f"encoder.down.{level}.block.", ".conv1.weight") for level in levels}
    return AutoencoderConfig(
        base_channels=base,
        channel_mult=_multiples(widths, base),
        res_blocks=_only(blocks, "number of residual blocks"),
        latent_channels=_size(shapes, "decoder.conv_in.weight", 4, 1),
        image_channels=_size(shapes, "encoder.conv_in.weight", 4, 1),
        norm_groups=math.gcd(32, base, *widths),
    )


def is_tiny_autoencoder(shapes: Shapes) -> bool:
    """Whether a first stage is a tiny one, or half of one: its first blocks tell."""
    return "decoder.3.conv.0.weight" in shapes or "encoder.1.conv.0.weight" in shapes


def tiny_autoencoder_config(shapes: Shapes) -> TinyAutoencoderConfig:
    """The config of a tiny autoencoder in TAESD's names: what stands between its decoder's single convolutions."""
    if not any(name.startswith("decoder.") for name in shapes):
        raise LdmError("is the encoder of a tiny autoencoder without its decoder; name the decoder's file")
    found = (re.fullmatch(r"decoder\.(\d{1,3})\.weight", name) for name in shapes)
    single = sorted(int(match[1]) for match in found if match)
    blocks = [sum(f"decoder.{layer}.conv.0.weight" in shapes for layer in range(*ends)) for ends in pairwise(single)]
    return TinyAutoencoderConfig(
        channels=_size(shapes, "decoder.1.weight", 4, 0),
        blocks=tuple(reversed(blocks)),
        latent_channels=_size(shapes, "decoder.1.weight", 4, 1),
        encoder=any(name.startswith("encoder.") for name in shapes),
    )


def clip_config(shapes: Shapes) -> TextConfig:
    """The config of a text tower in Hugging Face's CLIP names (`text_model.`)."""
    vocabulary, width = _two(shapes, "text_model.embeddings.token_embedding.weight")
    return TextConfig(
        width=width,
        layers=_some(shapes, "text_model.encoder.layers.", ".layer_norm1.weight"),
        heads=width // math.gcd(64, width),
        vocabulary=vocabulary,
        tokens=_size(shapes, "text_model.embeddings.position_embedding.weight", 2, 0),
    )


def open_clip_config(shapes: Shapes) -> TextConfig:
    """The config of a text tower in OpenCLIP's names. Without a projection it serves where nothing is pooled."""
    vocabulary, width = _two(shapes, "token_embedding.weight")
    return TextConfig(
        width=width,
        layers=_some(shapes, "transformer.resblocks.", ".ln_1.weight"),
        heads=width // math.gcd(64, width),
        projection=_size(shapes, "text_projection", 2, 1) if "text_projection" in shapes else None,
        names="open_clip",
        activation="gelu",
        vocabulary=vocabulary,
        tokens=_size(shapes, "positional_embedding", 2, 0),
    )


def image_config(shapes: Shapes) -> ImageConfig:
    """The config of CLIP's image tower in OpenCLIP's names. Both published ones have 16 heads; OpenAI's is 768 wide."""
    width, patch = _size(shapes, "conv1.weight", 4, 0), _size(shapes, "conv1.weight", 4, 3)
    tokens, projection = _size(shapes, "positional_embedding", 2, 0), _size(shapes, "proj", 2, 1)
    return ImageConfig(
        width=width,
        layers=_some(shapes, "transformer.resblocks.", ".ln_1.weight"),
        heads=math.gcd(16, width),
        projection=projection,
        patch=patch,
        size=patch * math.isqrt(tokens - 1),
        activation="quick_gelu" if projection == 768 else "gelu",
    )


def _input_levels(shapes: Shapes) -> list[list[str]]:
    """The prefixes of the residual stages of `input_blocks`, level by level."""
    levels: list[list[str]] = [[]]
    for index in count(1):
        stage = f"input_blocks.{index}."
        if f"{stage}0.op.weight" in shapes:
            levels.append([])
        elif f"{stage}0.out_layers.3.weight" in shapes:
            levels[-1].append(stage)
        else:
            break
    if not all(levels):
        raise LdmError("its U-Net has a level without residual blocks")
    return levels


def _depth(shapes: Shapes, prefix: str) -> int:
    """How many transformer blocks stand there; 1 for plain self-attention, 0 for none."""
    return 1 if f"{prefix}qkv.weight" in shapes else _count(shapes, f"{prefix}transformer_blocks.", ".norm1.weight")


def _is_cross_only(shapes: Shapes, stage: str, context: int | None) -> bool:
    """Whether the first attention looks at the text. Where the level is as wide as the text, shapes do not tell: no."""
    shape = shapes.get(f"{stage}1.transformer_blocks.0.attn1.to_k.weight")
    return shape is not None and len(shape) == 2 and shape[1] == context != shape[0]


def _multiples(widths: Iterable[int], base: int) -> tuple[int, ...]:
    """Widths as multiples of the first one."""
    multiples = tuple(width // base for width in widths)
    if any(mult * base != width for mult, width in zip(multiples, widths, strict=True)):
        raise LdmError(f"its widths {list(widths)} are no multiples of {base}")
    return multiples


def _only(values: set[int], what: str) -> int:
    """The one value that all blocks share."""
    if len(values) != 1:
        raise LdmError(
            f"its {what} differs between blocks of one kind ({sorted(values)}): an architecture that is not known"
        )
    return values.pop()


def _count(shapes: Shapes, prefix: str, suffix: str) -> int:
    """How many of prefix + 0 + suffix, prefix + 1 + suffix ... follow each other."""
    return next(index for index in count() if f"{prefix}{index}{suffix}" not in shapes)


def _some(shapes: Shapes, prefix: str, suffix: str) -> int:
    """The same, where there must be one at least."""
    if f"{prefix}0{suffix}" not in shapes:
        raise LdmError(f"tensor {prefix}0{suffix} is missing")
    return _count(shapes, prefix, suffix)


def _two(shapes: Shapes, name: str) -> tuple[int, int]:
    return _size(shapes, name, 2, 0), _size(shapes, name, 2, 1)


def _size(shapes: Shapes, name: str, rank: int, axis: int) -> int:
    """One size of a tensor that must be there with this rank."""
    shape = shapes.get(name)
    if shape is None:
        raise LdmError(f"tensor {name} is missing")
    if len(shape) != rank or 0 in shape:
        raise LdmError(f"tensor {name} has shape {shape}, expected {rank} sizes, none zero")
    return shape[axis]

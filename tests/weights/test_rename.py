"""Generated names against the classes that own them: every key and shape at full size, and bit-equal round trips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import (
    CLIP_L,
    OPENCLIP_BIGG,
    OPENCLIP_H,
    SystemConfig,
    sd1,
    sd2,
    sd_x4_upscaler,
    sdxl,
    sdxl_refiner,
    tiny,
)
from ldm.models.text_encoder import TextConfig, text_tower
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.layout import unfilled
from ldm.weights.rename import (
    Names,
    Piece,
    autoencoder_config_of,
    autoencoder_names,
    controlnet_names,
    controlnet_prefixes_of,
    join,
    joined_shape,
    renamed,
    split,
    text_config_of,
    text_names,
    unet_config_of,
    unet_names,
)

SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SDXL: dict[str, Any] = {
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER: dict[str, Any] = SDXL | {
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
    "block_out_channels": [384, 768, 1536, 1536],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UPSCALER: dict[str, Any] = {
    "in_channels": 7,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
    "block_out_channels": [256, 512, 512, 1024],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
}
UNCLIP: dict[str, Any] = SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}

# our config, what their class is told, where the vector goes: as published in the models' config.json
UNETS: dict[str, tuple[UNetConfig, dict[str, Any], str]] = {
    "sd1": (sd1().unet, {"cross_attention_dim": 768}, "add_embedding"),
    "sd1-inpainting": (sd1(9).unet, {"cross_attention_dim": 768, "in_channels": 9}, "add_embedding"),
    "sd2": (sd2().unet, SD2, "add_embedding"),
    "sd2-inpainting": (sd2(in_channels=9).unet, SD2 | {"in_channels": 9}, "add_embedding"),
    "sd2-depth": (sd2(in_channels=5).unet, SD2 | {"in_channels": 5}, "add_embedding"),
    "sdxl": (sdxl().unet, SDXL, "add_embedding"),
    "sdxl-inpainting": (sdxl(9).unet, SDXL | {"in_channels": 9}, "add_embedding"),
    "sdxl-refiner": (sdxl_refiner().unet, REFINER, "add_embedding"),
    "upscaler": (sd_x4_upscaler().unet, UPSCALER, "add_embedding"),
    "unclip": (UNetConfig(context_width=1024, heads=None, head_width=64, linear_projections=True, vector_width=2048),
               UNCLIP, "class_embedding"),
}  # fmt: skip

AUTOENCODERS = {"f8": ((128, 256, 512, 512), AutoencoderConfig()),
                "f4": ((128, 256, 512), sd_x4_upscaler().autoencoder)}  # fmt: skip


def meta(build: Any, *args: Any, **settings: Any) -> dict[str, tuple[int, ...]]:
    network: nn.Module = unfilled(lambda: build(*args, **settings))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def assert_maps(names: Names, ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of both sides is named once, and the shapes are those that joining gives."""
    named = [name for piece in names.values() for name in piece.names]
    assert len(named) == len(set(named))
    assert set(named) == set(theirs)
    assert {name: joined_shape(piece, theirs) for name, piece in names.items()} == ours


@pytest.mark.parametrize("layout", UNETS)
def test_unet(layout: str) -> None:
    config, settings, vector = UNETS[layout]
    theirs = meta(diffusers.UNet2DConditionModel, **settings)
    assert_maps(unet_names(config, vector), meta(UNet, config), theirs)
    found = unet_config_of(theirs)
    assert found == replace(config, cross_only=found.cross_only)
    levels = zip(config.attention, config.cross_only, found.cross_only, strict=True)
    assert all(cross == read for depth, cross, read in levels if depth)


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_controlnet(layout: str) -> None:
    unet, settings, vector = UNETS[layout]
    settings = {name: value for name, value in settings.items() if name != "up_block_types"}
    theirs = meta(diffusers.ControlNetModel, **settings)
    config = ControlNetConfig(unet)
    ours = meta(ControlNet, config)
    assert_maps(controlnet_names(config, vector), ours, theirs)
    back = {theirs: ours for ours, theirs in controlnet_prefixes_of(theirs).items()}
    assert {renamed(name, back): shape for name, shape in theirs.items()} == ours


@pytest.mark.parametrize("layout", AUTOENCODERS)
def test_autoencoder(layout: str) -> None:
    widths, config = AUTOENCODERS[layout]
    theirs = meta(
        diffusers.AutoencoderKL,
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=2,
        latent_channels=4,
    )
    assert_maps(autoencoder_names(config), meta(AutoencoderKL, config), theirs)
    found = autoencoder_config_of(theirs)
    assert (found.channel_mult, found.base_channels, found.res_blocks) == (config.channel_mult, 128, 2)


@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_H, OPENCLIP_BIGG], ids=["L", "H", "bigG"])
def test_text(config: TextConfig) -> None:
    theirs = their_text(config)
    if config.projection is None:
        del theirs["text_projection.weight"]
    assert_maps(text_names(config), meta(text_tower, config), theirs)
    assert text_config_of(theirs, config.names) == config


def their_text(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """What their class holds, as on disk: from transformers 5 on, memory lacks the prefix in one of its classes."""
    settings = CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        projection_dim=config.projection or config.width,
    )
    plain, projecting = (meta(kind, settings) for kind in (CLIPTextModel, CLIPTextModelWithProjection))
    assert {name.removeprefix("text_model.") for name in plain} == {
        name.removeprefix("text_model.") for name in projecting if name != "text_projection.weight"
    }
    return {name: shape for name, shape in projecting.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize("preset", [sd1, sd2, sdxl, sdxl_refiner, sd_x4_upscaler])
def test_there_and_back_is_bit_equal(preset: Any) -> None:
    config: SystemConfig = tiny(preset())
    generator = torch.Generator().manual_seed(0)
    for names, network in (
        (unet_names(config.unet), UNet(config.unet)),
        (autoencoder_names(config.autoencoder), AutoencoderKL(config.autoencoder)),
        *((text_names(use.tower), text_tower(use.tower)) for use in config.text),
    ):
        ours = {name: torch.randn(t.shape, generator=generator) for name, t in network.state_dict().items()}
        theirs: dict[str, Tensor] = {}
        for name, piece in names.items():
            theirs |= split(piece, ours[name])
        back = {name: join(piece, theirs) for name, piece in names.items()}
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_forms() -> None:
    """Each form by hand, so that both directions cannot be wrong together."""
    numbers = torch.arange(6.0).reshape(6, 1)
    assert torch.equal(join(Piece(("a", "b"), "rows"), {"a": numbers[:2], "b": numbers[2:]}), numbers)
    assert list(split(Piece(("a", "b", "c"), "rows"), numbers)["b"]) == [2, 3]
    assert joined_shape(Piece(("a", "b"), "rows"), {"a": (2, 1), "b": (4, 1)}) == (6, 1)
    assert split(Piece(("a",), "transposed"), torch.tensor([[1, 2], [3, 4]]))["a"].tolist() == [[1, 3], [2, 4]]
    assert split(Piece(("a",), "linear"), torch.ones(2, 3, 1, 1))["a"].shape == (2, 3)
    with pytest.raises(LdmError, match="tensor a has shape"):
        joined_shape(Piece(("a",), "transposed"), {"a": (2,)})
    with pytest.raises(LdmError, match="do not fit together"):
        joined_shape(Piece(("a", "b"), "rows"), {"a": (2, 3), "b": (2, 4)})


def test_a_network_without_blocks_is_an_error() -> None:
    with pytest.raises(LdmError, match=r"down_blocks\.0\.resnets\.0\.conv1\.weight is missing"):
        unet_config_of({"conv_in.weight": (320, 4, 3, 3)})
    with pytest.raises(LdmError, match="without text"):
        unet_names(UNetConfig(context_width=None))

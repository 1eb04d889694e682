"""The image tower against open_clip's and transformers' own, and the noise augmentor against diffusers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, get_model_config
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.diffusion.schedule import cosine
from ldm.models.image_encoder import ImageConfig, ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.presets import OPENCLIP_H_IMAGE, OPENCLIP_L_IMAGE, SMALL_TEXT
from ldm.weights.architecture import image_config, under
from ldm.weights.clip import read_clip

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "ldm-small.safetensors"
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)], ids=["float32", "float64"]
)


def open_clip_model(config: ImageConfig) -> CLIP:
    """open_clip's model with an image tower of these widths, and the least of text towers."""
    vision = CLIPVisionCfg(
        layers=config.layers, width=config.width, head_width=config.width // config.heads, patch_size=config.patch,
        image_size=config.size,
    )  # fmt: skip
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=32, heads=2, layers=1)
    return CLIP(config.projection, vision, text, quick_gelu=config.activation == "quick_gelu")


def pixels(config: ImageConfig, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, config.size, config.size, generator=generator).to(dtype)


@PRECISIONS
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.inference_mode()
def test_image_tower_equals_open_clip(activation, dtype, tolerance, randomize, relative_error):
    config = ImageConfig(64, 3, 4, projection=24, patch=7, size=28, activation=activation)
    theirs, ours = randomize(open_clip_model(config)).to(dtype), ImageTower(config).to(dtype)
    ours.load_state_dict(theirs.visual.state_dict())
    x = pixels(config, dtype)
    assert relative_error(ours(x), theirs.encode_image(x)) < tolerance


@PRECISIONS
@torch.inference_mode()
def test_image_tower_equals_transformers(dtype, tolerance, randomize, relative_error):
    config = ImageConfig(64, 3, 4, projection=24, patch=7, size=28, activation="quick_gelu")
    ours = randomize(ImageTower(config)).to(dtype)
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=256, projection_dim=24, num_hidden_layers=3, num_attention_heads=4,
            image_size=28, patch_size=7, hidden_act="quick_gelu",
        )
    ).eval().to(dtype)  # fmt: skip
    theirs.load_state_dict(in_their_names(ours.state_dict(), theirs.state_dict()))
    x = pixels(config, dtype)
    assert relative_error(ours(x), theirs(x).image_embeds) < tolerance


WORDS = (
    ("class_embedding", "embeddings.class_embedding"), ("conv1", "embeddings.patch_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"), ("transformer.resblocks", "encoder.layers"), ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"), ("attn.", "self_attn."), ("c_fc", "fc1"), ("c_proj", "fc2"),
)  # fmt: skip
"""Their words for ours, in this order."""


def in_their_names(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"visual_projection.weight": ours["proj"].T.contiguous()}
    for name, tensor in ours.items():
        if name == "proj":
            continue
        for word, their_word in WORDS:
            name = name.replace(word, their_word)
        if ".in_proj_" in name:
            for part, one in zip("qkv", tensor.chunk(3), strict=True):
                state[f"vision_model.{name.replace('in_proj_', f'{part}_proj.')}"] = one
        else:
            state[f"vision_model.{name}"] = tensor
    return {name: state[name] for name in theirs if not name.endswith("position_ids")}


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("config", "name", "millions"),
    [(OPENCLIP_H_IMAGE, "ViT-H-14", 632.08), (OPENCLIP_L_IMAGE, "ViT-L-14-quickgelu", 303.97)],
)
def test_full_size_names_and_shapes(config, name, millions):
    published = get_model_config(name)
    with torch.device("meta"):
        ours, theirs = ImageTower(config), CLIP(**published).visual
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert theirs.transformer.resblocks[0].attn.num_heads == config.heads
    assert published.get("quick_gelu", False) == (config.activation == "quick_gelu")
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@torch.inference_mode()
def test_the_tower_that_ships(relative_error):
    """The same class reads the image tower of our own file."""
    state = {name: tensor.float() for name, tensor in under(read_clip(SHIPPED), "visual.").items()}
    config = replace(image_config(shapes(state)), heads=SMALL_TEXT.heads)  # as its text tower has
    theirs, ours = open_clip_model(config), ImageTower(config)
    theirs.visual.load_state_dict(state)
    ours.load_state_dict(state)
    x = pixels(config, torch.float32)
    assert relative_error(ours(x), theirs.eval().encode_image(x)) < 1e-4


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("level", [0, 1, 500, 999])
def test_noise_augmentation_equals_diffusers(level, statistics):
    """As their pipeline's `noise_image_embeddings`, by their normalizer, scheduler and level features."""
    generator = torch.Generator().manual_seed(level)
    embedding, noise, mean, std = torch.randn(4, 3, 16, generator=generator)
    normalizer, ours = StableUnCLIPImageNormalizer(16), NoiseAugmentor(16, statistics)
    if statistics:
        state = {"mean": mean[:1], "std": std[:1].abs() + 0.5}
        normalizer.load_state_dict(state)
        ours.load_state_dict({f"data_{name}": tensor for name, tensor in state.items()})
    levels = torch.tensor([level] * 3)
    noised = DDPMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(normalizer.scale(embedding), noise, levels)
    features = get_timestep_embedding(levels, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = torch.cat([normalizer.unscale(noised), features], dim=1)
    found = ours(embedding, noise, levels, *cosine().alpha_sigma(levels))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

"""Every preset, at full size on `meta` and small for real: the parts of a system fit together.

That each network is the published one is tested beside the networks; here is what a system does with them.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from open_clip import get_model_config

from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.models import presets
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.pixel_blocks import first_stage
from ldm.models.presets import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, SystemConfig, TextUse, tiny
from ldm.models.text_encoder import text_tower
from ldm.models.tokenizer import END, tokenize
from ldm.models.unet import UNet
from ldm.types import Conditioning

PRESETS = {
    name: function
    for name, function in inspect.getmembers(presets, inspect.isfunction)
    if function.__module__ == presets.__name__ and name not in ("tiny", "decoder_of") and not name.startswith("_")
}
"""All of them, so that a new one is tested as soon as it exists."""

VARIANTS = [
    *(pytest.param(function(), id=name) for name, function in PRESETS.items()),
    pytest.param(presets.sd1(in_channels=9), id="sd1-inpaint"),
    pytest.param(presets.sd2("v"), id="sd2-v"),
    pytest.param(presets.sd2(in_channels=5), id="sd2-depth"),
]


def forward(config: SystemConfig, device: str) -> dict[str, torch.Tensor]:
    """Text, encoding, one call of the U-Net and decoding, as a pipeline does them, for a batch of one."""
    with torch.device(device), torch.inference_mode():
        unet, autoencoder = UNet(config.unet).eval(), first_stage(config.autoencoder).eval()
        states, pooled = [], []
        for use in config.text:
            ids = torch.tensor([tokenize("a red apple", use.tower.tokens, use.padding)])
            encoded = text_tower(use.tower)(ids, use.skip, use.final_norm, use.pooled)
            states.append(encoded.states)
            pooled += [] if encoded.pooled is None else [encoded.pooled]
        vector = torch.tensor([20]) if config.unet.classes else None
        if config.image is not None:
            tower = config.image.tower
            embedding = ImageTower(tower).eval()(torch.zeros(1, 3, tower.size, tower.size))
            zero, one = torch.zeros(1), torch.ones(1)
            vector = NoiseAugmentor(tower.projection, config.image.statistics)(embedding, embedding, zero, one, zero)
            if config.image.tokens:
                tokens = ImageTokens(tower.projection, config.image.tokens, config.unet.context_width or 0)(vector)
                states = [torch.cat([*states, tokens], dim=1)]
        if pooled:
            rest = torch.zeros(1, 256 * config.sizes_in_vector) if vector is None else vector
            vector = torch.cat([*pooled, rest], dim=1)
        latents = autoencoder.encode(torch.zeros(1, 3, config.size, config.size))
        extra = config.unet.in_channels - latents.shape[1]
        concat = torch.zeros(1, extra, *latents.shape[2:]) if extra else None
        cross = torch.cat(states, dim=-1) if states else None
        cond = Conditioning(cross=cross, vector=vector, concat=concat)
        prediction = unet(latents, torch.tensor([500.0]), cond)
        return {"latents": latents, "prediction": prediction, "picture": autoencoder.decode(prediction)}


def shapes(config: SystemConfig) -> dict[str, tuple[int, ...]]:
    side = config.size // config.autoencoder.downsampling
    latent = (1, config.autoencoder.latent_channels, side, side)
    return {"latents": latent, "prediction": latent, "picture": (1, 3, config.size, config.size)}


@pytest.mark.parametrize("config", VARIANTS)
def test_full_size_parts_fit_together(config):
    assert {name: tuple(t.shape) for name, t in forward(config, "meta").items()} == shapes(config)
    assert config.schedule in NOISE_SCHEDULES


@pytest.mark.parametrize("config", VARIANTS)
def test_tiny_parts_fit_together(config):
    small = tiny(config)
    torch.manual_seed(0)
    results = forward(small, "cpu")
    assert {name: tuple(t.shape) for name, t in results.items()} == shapes(small)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("config", VARIANTS)
def test_tiny_is_small_and_keeps_the_layout(config):
    small = tiny(config)
    assert parameters(small) < min(10_000_000, parameters(config) / 2)
    assert small.unet.linear_projections == config.unet.linear_projections
    assert small.unet.cross_only == config.unet.cross_only
    assert [depth > 0 for depth in small.unet.attention] == [depth > 0 for depth in config.unet.attention]
    assert len(small.unet.channel_mult) == len(config.unet.channel_mult)
    assert small.autoencoder.downsampling == config.autoencoder.downsampling
    assert [use.tower.names for use in small.text] == [use.tower.names for use in config.text]
    kept = ("family", "prediction", "schedule", "zero_terminal_snr", "sizes_in_vector")
    assert all(getattr(small, name) == getattr(config, name) for name in kept)


def test_what_each_family_takes_from_its_towers():
    """Rombach et al. 2022 for SD 1.x; Podell et al. 2023, section 2 for SDXL; the published configs for the rest."""
    assert presets.sd1().text == (TextUse(CLIP_L, skip=0, final_norm=True, pooled=False, padding=END),)
    assert presets.sd2().text == (TextUse(OPENCLIP_H, skip=1, final_norm=True, pooled=False, padding=0),)
    assert presets.sd_x4_upscaler().text == presets.sd2().text
    second = TextUse(OPENCLIP_BIGG, skip=1, final_norm=False, pooled=True, padding=0)
    assert presets.sdxl().text == (TextUse(CLIP_L, skip=1, final_norm=False, pooled=False, padding=END), second)
    assert presets.sdxl_refiner().text == (second,)


@pytest.mark.parametrize(("tower", "name"), [(OPENCLIP_H, "ViT-H-14"), (OPENCLIP_BIGG, "ViT-bigG-14")])
def test_towers_have_open_clips_published_widths(tower, name):
    published = get_model_config(name)
    text = published["text_cfg"]
    ours = (tower.width, tower.layers, tower.heads, tower.vocabulary, tower.tokens, tower.projection)
    keys = ("width", "layers", "heads", "vocab_size", "context_length")
    assert ours == (*(text[key] for key in keys), published["embed_dim"])
    assert tower.activation == ("quick_gelu" if published.get("quick_gelu") else "gelu")


@pytest.mark.parametrize(
    ("config", "prediction", "size", "scale", "schedule"),
    [
        (presets.sd1(), "eps", 512, 0.18215, "scaled-linear"),
        (presets.sd2(), "eps", 512, 0.18215, "scaled-linear"),
        (presets.sd2("v"), "v", 768, 0.18215, "scaled-linear"),
        (presets.sd_x4_upscaler(), "v", 512, 0.08333, "upscaler"),
        (presets.sdxl(), "eps", 1024, 0.13025, "scaled-linear"),
        (presets.sdxl_refiner(), "eps", 1024, 0.13025, "scaled-linear"),
    ],
    ids=["sd1", "sd2", "sd2-v", "x4-upscaler", "sdxl", "sdxl-refiner"],
)
def test_numbers_of_the_published_configs(config, prediction, size, scale, schedule):
    """`parameterization`, training size, `scale_factor` and `linear_start` .. `linear_end` of the original files."""
    found = (config.prediction, config.size, config.autoencoder.scale_factor, config.schedule)
    assert found == (prediction, size, scale, schedule)
    assert config.autoencoder.shift_factor == 0 and not config.zero_terminal_snr


def test_the_shipped_model_fits_its_file():
    """At most 47 M parameters, so that the file stays under 95 MB in fp16."""
    assert parameters(presets.small()) < 47_000_000


def parameters(config: SystemConfig) -> int:
    with torch.device("meta"):
        parts = [UNet(config.unet), first_stage(config.autoencoder), *(text_tower(use.tower) for use in config.text)]
    return sum(p.numel() for part in parts for p in part.parameters())

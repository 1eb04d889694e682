"""The published variants at reduced width, from a file without any config: what they are found to be, and their U-Net.

The files hold what real ones hold beside the networks, too. diffusers' U-Net gets the weights by its own converter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, image_transform
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.diffusion.schedule import cosine
from ldm.errors import LdmError
from ldm.models.presets import (
    SystemConfig,
    sd1,
    sd2,
    sd2_unclip,
    sd_x4_upscaler,
    sdxl,
    sdxl_refiner,
    tiny,
)
from ldm.models.unet import UNetConfig
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.types import Conditioning
from ldm.weights.detect import detect
from ldm.weights.io import TensorInfo
from ldm.weights.layout import AUGMENTOR, IMAGE, Networks, build
from ldm.weights.save import modelspec
from ldm.weights.source import Source

WIDTH = 64
LINES = torch.linspace(1e-4, 0.02, 1000)


def unclip(tower: Any, projection: int) -> SystemConfig:
    """Reduced but for the width of the embedding, which tells the two towers apart."""
    config = tiny(sd2_unclip(tower), WIDTH)
    assert config.image is not None
    image = replace(config.image.tower, projection=projection)
    unet = replace(config.unet, vector_width=2 * projection)
    return replace(config, unet=unet, image=replace(config.image, tower=image, statistics=tower == "l"))


@dataclass(frozen=True)
class Variant:
    """A reduced system, what else its files hold, and what must be found out.

    variant, family, prediction: words of the rules; size: the native one.
    """

    config: SystemConfig
    variant: str
    family: str
    prediction: str
    size: int
    more: dict[str, Tensor] = field(default_factory=dict)


UNCLIP = {
    **{f"{AUGMENTOR}{name}": LINES.clone() for name in ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod")},
    "embedder.model.logit_scale": torch.ones(()),
    "embedder.model.ln_final.weight": torch.ones(WIDTH),
    "embedder.model.token_embedding.weight": torch.ones(10, WIDTH),
}
OF_SD1, OF_SD2 = "text encoder under cond_stage_model.transformer", "text encoder under cond_stage_model.model"
OF_SDXL = "text encoder under conditioner.embedders.1.model"
UNCLIP_FOUND = ("unCLIP (varies a picture)", OF_SD2, "v (SD 2.1 unCLIP predicts v)", 768, UNCLIP)
VARIANTS = {
    "SD 1.x inpainting": Variant(tiny(sd1(9), WIDTH), "inpainting", OF_SD1, "eps (sd1 files predict eps", 512),
    "SD 2.x inpainting": Variant(tiny(sd2("eps", 9), WIDTH), "inpainting", OF_SD2, "eps (SD 2.x models with 9", 512),
    "SDXL inpainting": Variant(tiny(sdxl(9), WIDTH), "inpainting", OF_SDXL, "eps (sdxl files predict eps", 1024),
    "SD 2.x depth": Variant(
        tiny(sd2(in_channels=5), WIDTH), "depth to image", OF_SD2, "eps (SD 2.x models with 5", 512,
        {"depth_model.model.scratch.output_conv.0.weight": torch.ones(2, 2)},
    ),
    "x4 upscaler": Variant(
        tiny(sd_x4_upscaler(), WIDTH), "x4 upscaler", OF_SD2, "v (the x4 upscaler predicts v)", 512,
        {"low_scale_model.betas": LINES.clone()},
    ),
    "unCLIP h": Variant(unclip("h", 1024), *UNCLIP_FOUND),
    "unCLIP l": Variant(unclip("l", 768), *UNCLIP_FOUND),
    "SDXL v, zero terminal SNR": Variant(
        replace(tiny(sdxl(), WIDTH), prediction="v", zero_terminal_snr=True), "text to image", OF_SDXL,
        "v (marker tensor v_pred)", 1024, {"v_pred": torch.ones(()), "ztsnr": torch.ones(())},
    ),
    "SDXL refiner": Variant(
        tiny(sdxl_refiner(), WIDTH), "text to image", "text encoder under conditioner.embedders.0.model",
        "eps (sdxl-refiner files predict eps", 1024,
    ),
}  # fmt: skip


def tensors_of(model: LatentDiffusion) -> dict[str, Tensor]:
    towers: Any = model.text
    parts = Networks(model.config, model.unet, model.autoencoder, towers, model.image, model.augmentor).by_prefix()
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    if f"{AUGMENTOR}data_std" in state:
        state[f"{AUGMENTOR}data_std"] = state[f"{AUGMENTOR}data_std"].abs() + 0.5
    return state


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LatentDiffusion]:
    """A variant's model, from a file on disk; each made once."""
    folder, models = tmp_path_factory.mktemp("variants"), {}

    def get(name: str) -> LatentDiffusion:
        if name not in models:
            variant = VARIANTS[name]
            path = folder / f"{name}.safetensors"
            shared = {"scale_factor": torch.ones(()), "betas": LINES.clone(), "model_ema.decay": torch.ones(())}
            save_file({**tensors_of(random_system(variant.config)), **shared, **variant.more}, path)
            models[name] = load(path, device="cpu", dtype="float32")
        return models[name]

    return get


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("tower", ["h", "l"])
def test_full_size_unclip_is_read_off_its_shapes(tower, statistics):
    preset = sd2_unclip(tower)
    assert preset.image is not None
    config = replace(preset, image=replace(preset.image, statistics=statistics))
    parts = build(config).by_prefix()
    infos = {
        prefix + name: TensorInfo("F16", tuple(tensor.shape))
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    detection = detect(Source(Path("x.safetensors"), infos, {}, lambda names: iter(())))
    assert where_it_matters(detection.config) == where_it_matters(config)
    assert detection.notes == ()
    assert config.unet.vector_width == {"h": 2048, "l": 1536}[tower]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_it_is_found_to_be(name, loaded):
    variant, model = VARIANTS[name], loaded(name)
    family, prediction, *_ = model.origin.rules
    assert family == f"family: {variant.config.family}, {variant.variant} ({variant.family})"
    assert prediction.startswith(f"prediction: {variant.prediction}")
    assert model.origin.warnings == ()
    # What shapes do not tell is as in the published models.
    unet = replace(variant.config.unet, heads=model.config.unet.heads, head_width=model.config.unet.head_width)
    text = tuple(
        replace(use, tower=replace(use.tower, heads=found.tower.heads))
        for use, found in zip(variant.config.text, model.config.text, strict=True)
    )
    expected = replace(variant.config, unet=unet, text=text, size=variant.size)
    if expected.image is not None:
        tower = replace(expected.image.tower, heads=16)
        expected = replace(expected, image=replace(expected.image, tower=tower))
    assert where_it_matters(model.config) == where_it_matters(expected)
    published = variant.config.family != "sd1" and variant.variant != "x4 upscaler"
    assert (model.config.unet.head_width, model.config.unet.heads) == ((64, None) if published else (None, 8))


def where_it_matters(config: SystemConfig) -> SystemConfig:
    """`cross_only` of a level without attention means nothing."""
    pairs = zip(config.unet.cross_only, config.unet.attention, strict=True)
    return replace(config, unet=replace(config.unet, cross_only=tuple(cross and depth > 0 for cross, depth in pairs)))


def their_config(config: UNetConfig, sizes: int) -> dict[str, Any]:
    """diffusers' words for a U-Net; sizes: how many numbers stand behind the pooled text."""
    widths = [config.model_channels * mult for mult in config.channel_mult]
    given: dict[str, Any] = {
        "in_channels": config.in_channels,
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.attention)),
        "cross_attention_dim": config.context_width,
        "transformer_layers_per_block": tuple(depth or config.middle_attention for depth in config.attention),
        "attention_head_dim": tuple(config.heads_for(width) for width in widths),  # their name for heads
        "use_linear_projection": config.linear_projections,
        "only_cross_attention": config.cross_only,
        "num_class_embeds": config.classes,
    }
    if sizes:
        given |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    elif config.vector_width is not None:
        given |= {"class_embed_type": "projection"}
    return given | {"projection_class_embeddings_input_dim": config.vector_width}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_unet_equals_diffusers(name, loaded):
    model, generator = loaded(name), torch.Generator().manual_seed(1)
    config, sizes = model.config.unet, model.config.sizes_in_vector
    theirs_config = their_config(config, sizes)
    theirs = UNet2DConditionModel(**theirs_config).eval()
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in model.unet.state_dict().items()}
    words = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None, **theirs_config}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(checkpoint, words))
    assert config.context_width is not None
    x = torch.randn(2, config.in_channels, 16, 8, generator=generator)
    text, timestep = torch.randn(2, 7, config.context_width, generator=generator), torch.tensor([17.0, 801.0])
    vector, told = None, {}
    if config.classes is not None:
        vector = torch.tensor([20, 350])
        told = {"class_labels": vector}
    elif sizes:
        assert config.vector_width is not None
        pooled = torch.randn(2, config.vector_width - 256 * sizes, generator=generator)
        numbers = torch.tensor([[1024.0, 768, 0, 16, 1024, 768][:sizes]]).repeat(2, 1)
        features = get_timestep_embedding(numbers.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        vector = torch.cat([pooled, features.view(2, -1)], dim=1)
        told = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers}}
    elif config.vector_width is not None:
        vector = torch.randn(2, config.vector_width, generator=generator)
        told = {"class_labels": vector}
    extra = x[:, 4:] if config.in_channels > 4 else None
    output = model.unet(x[:, :4], timestep, Conditioning(cross=text, vector=vector, concat=extra))
    torch.testing.assert_close(output, theirs(x, timestep, text, **told).sample, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_first_stage_of_the_upscaler(loaded):
    """Three levels: a quarter of the side, where the others have an eighth."""
    model = loaded("x4 upscaler")
    config = model.config.autoencoder
    assert (config.downsampling, config.scale_factor, model.config.schedule) == (4, 0.08333, "upscaler")
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=tuple(config.base_channels * mult for mult in config.channel_mult),
        layers_per_block=config.res_blocks,
    ).eval()  # fmt: skip
    state = {f"first_stage_model.{name}": tensor for name, tensor in model.autoencoder.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(state, dict(theirs.config)))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels = model.autoencoder.decode(latents)
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, theirs.decode(latents / 0.08333).sample, atol=1e-4, rtol=1e-4)


def test_zero_terminal_snr_reaches_the_schedule(loaded):
    assert loaded("SDXL v, zero terminal SNR").schedule.sigma_max > 1e4
    assert loaded("SDXL inpainting").schedule.sigma_max < 15


@pytest.mark.parametrize("name", ["unCLIP h", "unCLIP l"])
@torch.inference_mode()
def test_the_vector_of_a_picture(name, loaded):
    """open_clip's preprocessing and tower, diffusers' normalizer, and the level's features."""
    model = loaded(name)
    tower = model.config.image.tower
    vision = CLIPVisionCfg(layers=2, width=WIDTH, head_width=4, patch_size=tower.patch, image_size=tower.size)
    theirs = CLIP(tower.projection, vision, CLIPTextCfg(4, 8, 32, 2, 1), quick_gelu=name.endswith("l")).eval()
    theirs.visual.load_state_dict(model.image.state_dict())
    normalizer = StableUnCLIPImageNormalizer(tower.projection)
    if model.augmentor.data_mean is not None:
        normalizer.load_state_dict({"mean": model.augmentor.data_mean, "std": model.augmentor.data_std})
    pixels = torch.randint(0, 256, (97, 60, 3), generator=torch.Generator().manual_seed(5)).byte().numpy()
    picture = Image.fromarray(pixels)
    embedding = theirs.encode_image(image_transform(tower.size, is_train=False)(picture)[None])
    noise = torch.randn(1, tower.projection, generator=torch.Generator().manual_seed(9))
    alpha, sigma = (weight.float() for weight in cosine().alpha_sigma(torch.tensor([300])))
    noised = normalizer.unscale(alpha * normalizer.scale(embedding) + sigma * noise)
    level = get_timestep_embedding(torch.tensor([300]), tower.projection, flip_sin_to_cos=True, downscale_freq_shift=0)
    vector = model.encode_image(picture, noise_level=300, seed=9)
    torch.testing.assert_close(vector, torch.cat([noised, level], dim=1), atol=1e-4, rtol=1e-4)
    assert vector.shape == (1, model.config.unet.vector_width)


def test_text_alone_tells_unclip_no_picture(loaded):
    model = loaded("unCLIP h")
    vector = model.encode_prompt("a red apple").vector
    assert vector.shape == (1, 2048)
    assert not vector.any()
    (picture,) = model.generate("a red apple", steps=1, width=64, height=64, seed=0)
    assert "it was given none" in " ".join(picture.notes)


def test_what_cannot_be_varied(loaded):
    with pytest.raises(LdmError, match="takes no picture to vary, expected"):
        loaded("SD 2.x depth").encode_image(Image.new("RGB", (64, 64)))
    with pytest.raises(LdmError, match="noise level: found 1000, expected 0 to 999"):
        loaded("unCLIP h").encode_image(Image.new("RGB", (64, 64)), noise_level=1000)
    with pytest.raises(LdmError, match="found 4x400, expected sides of at most 1:32"):
        loaded("unCLIP h").encode_image(Image.new("RGB", (4, 400)))


@pytest.mark.parametrize("name", ["unCLIP h", "unCLIP l"])
def test_unclip_is_written_as_it_was_read(name, loaded, tmp_path):
    model = loaded(name)
    save_checkpoint(model, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors", device="cpu", dtype="float32")
    assert again.config == model.config
    before, after = tensors_of(model), tensors_of(again)
    assert {n for n in before if n.startswith((IMAGE, AUGMENTOR))} <= before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    architecture = modelspec(model.config, "x")["modelspec.architecture"]
    assert architecture == f"stable-diffusion-v2-unclip-{name[-1]}"


def test_an_unclip_file_without_its_image_tower_is_refused(tmp_path):
    state = tensors_of(random_system(VARIANTS["unCLIP h"].config))
    save_file(
        {name: tensor for name, tensor in state.items() if not name.startswith(IMAGE)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(LdmError, match="expects 2048 numbers beside the text"):
        load(Path(tmp_path / "x.safetensors"), device="cpu")

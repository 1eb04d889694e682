"""Whole pictures equal diffusers' pipelines on the same weights, prompts and seeds, to 1e-3.

Theirs are built in code: their networks, with our tensors through their own converters, and their tokenizer from
open_clip's table. So prompt handling, conditioning, guidance, start noise, sampler and decoding are compared at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from open_clip.tokenizer import SimpleTokenizer
from their_networks import their_autoencoder, their_prediction, their_unet
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.state import finish_state
from ldm.models.presets import SystemConfig, TextUse, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.models.text_encoder import TextTower
from ldm.models.tokenizer import END
from ldm.pipeline.images import to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run

STEPS = 10
SEEDS = (5, 6)
PROMPT, NEGATIVE = "a red apple on a green table, isn't it?", "blurry, 3 worms"
TOLERANCE = 1e-3

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = SD | {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
TRAILING = LEADING | {"timestep_spacing": "trailing"}
KARRAS = LEADING | {"timestep_spacing": "linspace", "use_karras_sigmas": True}

# sampler, schedule, their scheduler, its settings, whether it rounds timesteps
SOLVERS: dict[str, tuple[str, str, Any, dict[str, Any], bool]] = {
    "ddim": ("ddim", "leading", diffusers.DDIMScheduler, LEADING | DDIM, False),
    "euler": ("euler", "leading", diffusers.EulerDiscreteScheduler, LEADING, False),
    "dpmpp-2m": ("dpmpp-2m", "trailing", diffusers.DPMSolverMultistepScheduler, TRAILING, False),
    "dpmpp-2m karras": ("dpmpp-2m", "karras", diffusers.DPMSolverMultistepScheduler, KARRAS, True),
    "unipc": ("unipc", "trailing", diffusers.UniPCMultistepScheduler, TRAILING, False),
}

LAYOUTS = {"sd1": sd1, "sd2-v": lambda: sd2("v"), "sdxl": sdxl}


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {name: random_system(tiny(preset()), seed=index) for index, (name, preset) in enumerate(LAYOUTS.items())}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, CLIPTokenizer]:
    """Their tokenizer by our padding id: 0 is the token "!"."""
    folder = tmp_path_factory.mktemp("tokenizer")
    table = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): index for word, index in table.encoder.items()}
    merges = [" ".join(pair) for pair in table.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return {id_: _their_tokenizer(folder, word) for id_, word in ((END, "<|endoftext|>"), (0, "!"))}


def _their_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77, local_files_only=True)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_to_image(layout, solver, models, tokenizers, monkeypatch):
    model = models[layout]
    sampler, schedule, scheduler, settings, rounds = SOLVERS[solver]
    if rounds:
        _round_timesteps(monkeypatch)
    request = GenerateRequest(
        prompt=PROMPT, negative=NEGATIVE, width=128, height=96, steps=STEPS, sampler=sampler, schedule=schedule,
        guidance=6.5, seed=SEEDS[0], count=len(SEEDS),
    )  # fmt: skip
    theirs = their_pipeline(model, tokenizers, scheduler(**settings, prediction_type=their_prediction(model.config)))
    assert_same(model, request, theirs(**their_arguments(request)).images)


@pytest.mark.parametrize("layout", ["sd1", "sd2-v"])
def test_guidance_rescale(layout, models, tokenizers):
    model = models[layout]
    request = GenerateRequest(
        prompt=PROMPT, width=128, height=128, steps=STEPS, sampler="ddim", guidance=9.0, rescale=0.7, seed=SEEDS[0],
        count=len(SEEDS),
    )  # fmt: skip
    _, _, scheduler, settings, _ = SOLVERS["ddim"]
    theirs = their_pipeline(model, tokenizers, scheduler(**settings, prediction_type=their_prediction(model.config)))
    assert_same(model, request, theirs(**their_arguments(request), guidance_rescale=0.7).images)


@pytest.mark.parametrize("empty_negative", ["zeros", "encoded"])
def test_empty_negative_of_sdxl(empty_negative, models, tokenizers):
    model = models["sdxl"]
    request = GenerateRequest(
        prompt=PROMPT, width=128, height=128, steps=4, sampler="euler", schedule="leading", seed=SEEDS[0],
        count=len(SEEDS), empty_negative=empty_negative,
    )  # fmt: skip
    theirs = their_pipeline(model, tokenizers, diffusers.EulerDiscreteScheduler(**LEADING))
    theirs.register_to_config(force_zeros_for_empty_prompt=empty_negative == "zeros")
    assert_same(model, request, theirs(**their_arguments(request) | {"negative_prompt": None}).images)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_image_to_image(strength, solver, models, tokenizers):
    model = models["sd1"]
    _, _, scheduler, settings, _ = SOLVERS[solver]
    pipeline = their_pipeline(model, tokenizers, scheduler(**settings))
    their_image_to_image = diffusers.StableDiffusionImg2ImgPipeline(
        **pipeline.components, requires_safety_checker=False
    )
    _compare_image_to_image(model, their_image_to_image, solver, strength)


def test_the_refiner_is_told_a_score(tokenizers):
    model = random_system(tiny(sdxl_refiner()), seed=4)
    pipeline = their_pipeline(model, tokenizers, diffusers.EulerDiscreteScheduler(**LEADING))
    pipeline.register_to_config(requires_aesthetics_score=True)
    _compare_image_to_image(model, pipeline, "euler", 0.3)


def _compare_image_to_image(model: LatentDiffusion, pipeline: Any, solver: str, strength: float) -> None:
    from ldm.pipeline.images import picture_bytes, to_tensor

    generator = torch.Generator().manual_seed(9)
    picture = to_image(torch.rand(3, 96, 128, generator=generator) * 2 - 1)
    request = GenerateRequest(
        prompt=PROMPT, negative=NEGATIVE, width=128, height=96, steps=STEPS, sampler=solver, schedule="leading",
        guidance=4.0, seed=SEEDS[0], count=len(SEEDS), image=picture_bytes(picture), strength=strength,
    )  # fmt: skip
    latent = model.autoencoder.encode(to_tensor(picture)[None])  # theirs would draw one from the distribution
    given = their_arguments(request)
    del given["width"], given["height"]
    given["image"] = torch.cat([latent] * len(SEEDS)) if model.config.family == "sd1" else latent
    if model.config.family == "sdxl-refiner":
        given |= {"original_size": (96, 128), "target_size": (96, 128)}
    assert_same(model, request, pipeline(**given, strength=strength).images)


def assert_same(model: LatentDiffusion, request: GenerateRequest, their_latents: Tensor) -> None:
    """Their final latents equal ours, and so do the pictures."""
    events = list(run(model, request))
    last = [event.step for event in events if isinstance(event, Progress)][-1]
    assert last is not None
    ours = finish_state(last.x, last.sigma_next)
    assert ours.shape == their_latents.shape
    scale = float(their_latents.abs().max())
    assert torch.isfinite(ours).all() and scale > 0.1
    assert torch.allclose(ours, their_latents, rtol=TOLERANCE, atol=TOLERANCE * scale)
    pixels = model.autoencoder.decode(their_latents)
    pictures = [event.image for event in events if isinstance(event, Picture)]
    for picture, expected in zip(pictures, pixels, strict=True):
        difference = np.asarray(picture, dtype=int) - np.asarray(to_image(expected), dtype=int)
        assert np.abs(difference).max() <= 1


def their_arguments(request: GenerateRequest) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "num_images_per_prompt": len(SEEDS),
        "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS],
        "output_type": "latent",
    }


def their_pipeline(model: LatentDiffusion, tokenizers: dict[int, CLIPTokenizer], scheduler: Any) -> Any:
    """A diffusers pipeline of the model's weights."""
    config = model.config
    texts = [their_text(tower, use, config) for tower, use in zip(model.text, config.text, strict=True)]
    parts: dict[str, Any] = {"unet": their_unet(model), "vae": their_autoencoder(model), "scheduler": scheduler}
    names = {1: ("",), 2: ("", "_2")}[len(texts)] if config.family != "sdxl-refiner" else ("_2",)
    parts |= {"text_encoder": None, "tokenizer": None}
    for name, text, use in zip(names, texts, config.text, strict=True):
        parts |= {f"text_encoder{name}": text, f"tokenizer{name}": tokenizers[use.padding]}
    match config.family:
        case "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        case "sdxl-refiner":
            pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
        case _:
            pipeline = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_text(tower: TextTower, use: TextUse, system: SystemConfig) -> torch.nn.Module:
    """SD 2.x in diffusers is one layer short and takes the last; SDXL is whole and takes the last but one."""
    config, short = use.tower, system.family == "sd2"
    theirs = CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers - short,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or config.width,
        vocab_size=config.vocabulary,
        bos_token_id=END - 1,
        eos_token_id=END,
        pad_token_id=use.padding,
    )
    kind = CLIPTextModelWithProjection if use.pooled else CLIPTextModel
    text = kind(theirs)
    assert isinstance(tower, torch.nn.Module)
    ours = tower.state_dict()
    if config.names == "open_clip":
        ours = converters.convert_open_clip_checkpoint(text, {f"x.{n}": t for n, t in ours.items()}, prefix="x.")
    expected = text.state_dict()
    if not any(name.startswith("text_model.") for name in expected):
        ours = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
    state = {name: ours[name] for name in expected if not name.endswith("position_ids")}
    text.load_state_dict(state, strict=False)
    return text.eval()


def _round_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of their schedulers show the network whole timesteps only; ours interpolate."""

    def denoiser(model: LatentDiffusion) -> Denoiser:
        return Denoiser(model.unet, model.schedule, model.config.prediction, nearest_timestep=True)

    monkeypatch.setattr(LatentDiffusion, "denoiser", denoiser)

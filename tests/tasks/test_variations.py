"""Variations: diffusers' unCLIP pipeline on the same embedding, with a noise of each picture's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from theirs import asked, assert_equal, final_latents, networks
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.diffusion.noise import start_noise
from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2_unclip, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest, HighRes
from ldm.pipeline.sample import Picture, Progress
from ldm.pipeline.clip import clip_pixels
from ldm.tasks import run
from ldm.tasks.common import other_seed
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd2_unclip()))


def picture(width: int = 60, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def asking(**fields: Any) -> GenerateRequest:
    given = {"prompt": "", "vary": picture_bytes(picture()), "width": 96, "height": 64, "steps": 4, "seed": 5}
    return GenerateRequest(**given | fields)


def their_tower(model: LatentDiffusion) -> CLIPVisionModelWithProjection:
    """Ours in transformers' names: its attention has three matrices where OpenCLIP's has one."""
    tower = model.image
    assert tower is not None
    config = tower.config
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.width, intermediate_size=4 * config.width, projection_dim=config.projection,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, image_size=config.size,
            patch_size=config.patch, hidden_act=config.activation,
        )
    )  # fmt: skip
    ours = tower.state_dict()
    state = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
    }
    names = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    for index in range(config.layers):
        their_layer, layer = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
        for name, our in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                          ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
            names[f"{their_layer}.{name}"] = f"{layer}.{our}"
        for kind in ("weight", "bias"):
            thirds = ours[f"{layer}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", thirds, strict=True):
                state[f"{their_layer}.self_attn.{letter}_proj.{kind}"] = part
    for their_name, name in names.items():
        for kind in ("weight", "bias"):
            state[f"{their_name}.{kind}"] = ours[f"{name}.{kind}"]
    state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    state["visual_projection.weight"] = ours["proj"].T
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    return theirs.eval()


@pytest.mark.parametrize(("level", "guidance"), [(0, 4.0), (700, 4.0), (300, 1.0)])
def test_it_equals_diffusers(level, guidance, model):
    request = asking(prompt="a pear", negative="blurry", vary_noise=level, guidance=guidance, sampler="ddim", count=2)
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        **networks(model),
        feature_extractor=None,
        image_encoder=their_tower(model),
        image_normalizer=StableUnCLIPImageNormalizer(model.image.config.projection),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = [
        pipeline(
            image=clip_pixels(picture(), model.image.config),
            **asked(model, request),
            width=96,
            height=64,
            noise_level=level,
            latents=start_noise((4, 8, 12), [seed]),
            generator=torch.Generator().manual_seed(other_seed(request.changed(seed=seed))),
        ).images
        for seed in (5, 6)
    ]
    assert_equal(final_latents(model, request), torch.cat(theirs))


def test_the_negative_side_is_told_zeros(model):
    told: list[Tensor] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        told.append(cond.vector)
        return model.unet(x, timestep, cond)

    list(run(replace(model, unet=watching), asking(steps=1, vary_noise=50)))  # pyright: ignore[reportArgumentType]
    wanted, unwanted = told[0]
    assert not unwanted.any()
    torch.testing.assert_close(wanted[None], model.encode_image(picture(), noise_level=50, seed=other_seed(asking())))


def test_a_picture_of_several_equals_its_seed_alone(model):
    fields = {"vary_noise": 600, "sampler": "euler-a"}
    several, alone = final_latents(model, asking(count=3, **fields)), final_latents(model, asking(seed=7, **fields))
    torch.testing.assert_close(several[2:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(several[0], several[1], atol=0.1)


def test_the_level_frees_it(model):
    """More noise, less of the picture: the drawn one moves away from that at level 0."""
    drawn = [final_latents(model, asking(vary_noise=level)) for level in (0, 200, 900)]
    assert 0 < (drawn[1] - drawn[0]).norm() < (drawn[2] - drawn[0]).norm()


def test_together_with_a_picture_to_start_from_and_a_second_pass(model):
    redrawn = [e for e in run(model, asking(image=picture_bytes(picture()), strength=0.5)) if isinstance(e, Progress)]
    assert {event.steps for event in redrawn} == {2}
    (larger,) = model.generate(asking(highres=HighRes(scale=1.5)))
    assert larger.image.size == (144, 96) and larger.notes == ()


def test_a_refiner_is_not_shown_the_picture(model):
    """It has no place for it; what it is told is its own."""
    refiner = random_system(tiny(sd1()), seed=1)
    told: list[Tensor | None] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        told.append(cond.vector)
        return refiner.unet(x, timestep, cond)

    watched = model.with_refiner(replace(refiner, unet=watching))  # pyright: ignore[reportArgumentType]
    list(run(watched, asking(refine_at=0.5, sampler="euler")))
    assert told == [None, None]


def test_events_count_through(model):
    events = list(run(model, asking(count=2, steps=1)))
    assert [event.index for event in events if isinstance(event, Picture)] == [0, 1]
    assert [event.first for event in events if isinstance(event, Progress)] == [0, 0, 1, 1]


def test_what_is_refused(model):
    with pytest.raises(LdmError, match=r"takes no picture to vary, expected an SD 2.1 unCLIP checkpoint"):
        random_system(tiny(sd1())).variations("", picture(), steps=1)
    with pytest.raises(LdmError, match="found 1x65535, expected sides of at most 1:32"):
        model.variations("", Image.new("RGB", (1, 65535)), steps=1)
    with pytest.raises(LdmError, match="vary: image: found a truncated or damaged picture"):
        model.variations("", picture_bytes(picture())[:-40])
    with pytest.raises(LdmError, match="mask: found together with vary"):
        list(run(model, asking(image=picture_bytes(picture()), mask=picture_bytes(picture()))))
    assert len(model.variations("", Image.new("RGB", (1, 1)), steps=1)) == 1

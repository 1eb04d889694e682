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
from ldm.models.presets import sd1, sd2_unclip, small_decoder, tiny
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.model import clip_pixels
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest, HighRes
from ldm.pipeline.sample import Picture, Progress
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


@pytest.fixture(scope="module")
def decoder() -> LatentDiffusion:
    model = random_system(tiny(small_decoder()))
    assert model.augmentor is not None
    model.augmentor.data_mean, model.augmentor.data_std = torch.full((1, 32), 0.3), torch.linspace(0.5, 2, 32)[None]
    return model


class TestDecoder:
    """Our own: the same path, with the pooled text in front and tokens behind the text's."""

    def test_it_is_told_what_the_paper_says(self, decoder):
        """Vector and tokens, each worked out from the formulas, on both sides of guidance."""
        told: list[Conditioning] = []

        def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            told.append(cond)
            return decoder.unet(x, timestep, cond)

        request = asking(prompt="a pear", negative="blurry", steps=1, vary_noise=700)
        list(run(replace(decoder, unet=watching), request))  # pyright: ignore[reportArgumentType]
        cond = told[0]
        tower = decoder.image(clip_pixels(picture(), decoder.image.config))
        unit = (tower / tower.norm() * 32**0.5 - 0.3) / torch.linspace(0.5, 2, 32)
        alpha = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[700]
        noise = torch.randn(1, 32, generator=torch.Generator().manual_seed(other_seed(asking())))
        noised = (alpha.sqrt() * unit + (1 - alpha).sqrt() * noise) * torch.linspace(0.5, 2, 32) + 0.3
        angles = 700 * torch.exp(-torch.arange(16) * np.log(10_000) / 16)
        seen = torch.cat([noised[0], angles.cos(), angles.sin()])
        for row, text, wanted in ((0, "a pear", seen), (1, "blurry", torch.zeros(64))):
            words = decoder.text[0](torch.tensor([tokenize(text)]), 1, True, pooled=True)
            assert cond.vector is not None and cond.cross is not None
            tokens = (decoder.image_tokens.proj.weight @ wanted + decoder.image_tokens.proj.bias).reshape(4, 32)
            torch.testing.assert_close(cond.vector[row], torch.cat([words.pooled[0], wanted]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(cond.cross[row], torch.cat([words.states[0], tokens]), rtol=1e-4, atol=1e-4)

    def test_what_is_told_last_counts(self, decoder):
        text = decoder.encode_prompt("a pear, " * 30)  # two chunks
        one, other = (torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        again = decoder.tell_image(decoder.tell_image(text, one, noise_level=500), other, seed=3)
        once = decoder.tell_image(text, other, seed=3)
        assert torch.equal(again.vector, once.vector) and torch.equal(again.cross, once.cross)
        assert once.cross.shape == (1, 2 * 77 + 4, 32) and torch.equal(once.cross[:, :-4], text.cross[:, :-4])
        assert torch.equal(once.vector[:, :32], text.vector[:, :32]) and not torch.equal(once.vector, text.vector)

    def test_several_embeddings_at_once(self, decoder):
        text, several = decoder.encode_prompt(""), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
        told = decoder.tell_image(Conditioning.stack([text] * 3), several)
        alone = decoder.tell_image(text, several[:1])
        assert torch.equal(told.vector[:1, 32:64], alone.vector[:, 32:64]), "the first row's noise is the same"
        assert told.cross.shape == (3, 81, 32)
        beside = decoder.tell_image(text, several)
        assert torch.equal(beside.vector, told.vector) and torch.equal(beside.cross, told.cross), "said thrice"
        with pytest.raises(LdmError, match="embedding: found 3 rows, expected 1 or 2, one for each prompt"):
            decoder.tell_image(Conditioning.stack([text] * 2), several)

    def test_an_embedding_has_length_sqrt_p(self, decoder, model):
        assert float(decoder.image_embedding(picture()).norm()) == pytest.approx(32**0.5, rel=1e-6)
        pixels = clip_pixels(picture(), model.image.config)
        assert torch.equal(model.image_embedding(picture()), model.image(pixels)), "SD 2.1 unCLIP: as it is"

    def test_it_draws_from_the_picture_or_from_the_text_alone(self, decoder):
        other = Image.new("RGB", (40, 40), "red")
        drawn = [final_latents(decoder, asking(vary=picture_bytes(p))) for p in (picture(), other)]
        alone = final_latents(decoder, asking(vary=None))
        assert not torch.allclose(drawn[0], drawn[1], atol=1e-3) and not torch.allclose(drawn[0], alone, atol=1e-3)
        (drawn_alone,) = decoder.generate("a pear", steps=1)
        assert drawn_alone.notes == ("this model varies pictures; it was given none, and draws from the text alone",)

    def test_what_is_refused(self, decoder):
        text = decoder.encode_prompt("")
        with pytest.raises(LdmError, match=r"takes no picture to vary, expected .* this package's decoder"):
            random_system(tiny(sd1())).image_embedding(picture())
        with pytest.raises(LdmError, match=r"embedding: found \(1, 33\), expected \(1, 32\)"):
            decoder.tell_image(text, torch.zeros(1, 33))
        with pytest.raises(LdmError, match="embedding: found numbers that are not finite"):
            decoder.tell_image(text, torch.full((1, 32), torch.nan))
        with pytest.raises(LdmError, match="noise level: found 1000, expected 0 to 999"):
            decoder.tell_image(text, torch.zeros(1, 32), noise_level=1000)

"""Depth to image: diffusers' pipeline with the same map, maps of every kind, and maps made by transformers' model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from theirs import asked, assert_equal, final_latents, networks
from torch import Tensor
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor, pipeline

from ldm.errors import LdmError
from ldm.models.depth import estimate
from ldm.models.presets import sd1, sd2, tiny
from ldm.pipeline.images import picture_bytes, read_levels
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest, HighRes
from ldm.tasks import depth2img, run
from ldm.tasks.depth2img import stretched
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd2(in_channels=5)))


def picture(width: int = 96, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def levels(width: int = 96, height: int = 64) -> np.ndarray:
    """A slope with a step in it, 16 bit."""
    slope = np.linspace(900, 30000, width)[None] + np.linspace(0, 9000, height)[:, None]
    slope[height // 4 : height // 2, : width // 2] += 15000
    return slope.astype(np.uint16)


def asking(**fields: Any) -> GenerateRequest:
    depth = picture_bytes(Image.fromarray(levels()))
    given = {"prompt": "a red apple", "depth": depth, "width": 96, "height": 64, "steps": 6, "seed": 5}
    return GenerateRequest(**given | fields)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_equals_diffusers(guidance, model, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    request = asking(
        negative="blurry", guidance=guidance, sampler="ddim", strength=0.5, image=picture_bytes(picture()), count=2
    )
    theirs = diffusers.StableDiffusionDepth2ImgPipeline(**networks(model), depth_estimator=None, feature_extractor=None)
    theirs.set_progress_bar_config(disable=True)
    given = asked(model, request, count=2) | {"strength": 0.5}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    depth = torch.from_numpy(levels().astype(np.float32))[None]
    expected = theirs(**given, image=[picture()] * 2, depth_map=torch.cat([depth] * 2), generator=generators).images
    assert_equal(final_latents(model, request), expected)


def shown_to(model: LatentDiffusion, request: GenerateRequest) -> list[Tensor]:
    """The channels beside the latent, at every call."""
    seen: list[Tensor] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.concat is not None
        seen.append(cond.concat)
        return model.unet(x, timestep, cond)

    list(run(replace(model, unet=watching), request))  # pyright: ignore[reportArgumentType]
    return seen


def test_from_text_alone_both_sides_see_the_map(model):
    seen = shown_to(model, asking(width=None, height=None, steps=2, depth=picture_bytes(Image.fromarray(levels()))))
    assert seen[0].shape == (2, 1, 8, 10)  # the map's shape, at the model's size: 78.4 x 52.3, at least 64
    assert torch.equal(seen[0][0], seen[0][1])
    assert float(seen[0].min()) == -1 and float(seen[0].max()) == 1


def test_eight_bits_say_the_same_as_sixteen(model):
    eight = np.linspace(10, 250, 96).round().astype(np.uint8)[None].repeat(64, axis=0)
    maps = [
        Image.fromarray(eight),
        Image.fromarray(eight).convert("RGB"),
        Image.fromarray(eight.astype(np.uint16) * 257),
    ]
    shown = [stretched(read_levels(picture_bytes(one)), [8, 12]) for one in maps]
    assert torch.allclose(shown[0], shown[1], atol=1e-5) and torch.allclose(shown[0], shown[2], atol=1e-5)
    assert (shown[0].diff(dim=3) > 0).all()


def test_sixteen_bits_are_kept():
    fine = (np.arange(96)[None].repeat(64, axis=0) + 30000).astype(np.uint16)  # less than one step of eight bits
    found = np.asarray(read_levels(picture_bytes(Image.fromarray(fine))))
    assert found.dtype == np.float32 and (found == fine).all()


@pytest.mark.parametrize("value", [0, 37, 255])
@pytest.mark.parametrize("size", [(96, 64), (1, 1), (200, 30)])
def test_a_map_of_one_depth_is_zeros(size, value, model):
    flat = Image.new("L", size, value)
    assert all((channel == 0).all() for channel in shown_to(model, asking(depth=picture_bytes(flat), steps=1)))


def test_another_size_is_fitted_as_the_picture_is(model):
    """A wide map for a square picture: its middle."""
    wide = np.full((64, 192), 20000, dtype=np.uint16)
    wide[:, 64:128] = levels(64, 64)
    fields = {"width": 64, "height": 64, "steps": 1}
    cut = shown_to(model, asking(**fields, depth=picture_bytes(Image.fromarray(wide))))
    middle = shown_to(model, asking(**fields, depth=picture_bytes(Image.fromarray(levels(64, 64)))))
    assert torch.allclose(cut[0], middle[0], atol=1e-5)


def test_the_second_pass_sees_a_larger_map(model):
    seen = shown_to(model, asking(steps=2, highres=HighRes(scale=2, strength=1.0)))
    assert [tuple(channel.shape[2:]) for channel in seen] == [(8, 12), (8, 12), (16, 24), (16, 24)]


def test_a_picture_of_a_batch_equals_its_seed_alone(model):
    batch, alone = final_latents(model, asking(count=2)), final_latents(model, asking(seed=6))
    torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_what_is_refused(model):
    ordinary = random_system(tiny(sd1()))
    with pytest.raises(LdmError, match="model: takes no depth map, expected Stable Diffusion 2 depth"):
        list(run(ordinary, asking()))
    with pytest.raises(LdmError, match=r"1 extra channels .*; give a depth map, as `ldm depth2img` does"):
        model.generate("x", steps=1)
    with pytest.raises(LdmError, match="depth: image: found a truncated or damaged picture"):
        asking(depth=picture_bytes(picture())[:-40])
    with pytest.raises(LdmError, match="mask: found together with depth"):
        list(run(model, asking(image=picture_bytes(picture()), mask=picture_bytes(picture()))))
    with pytest.raises(LdmError, match="depth: found none, expected a depth map"):
        list(depth2img(model, asking(depth=None)))


def test_a_thin_map_is_cut(model):
    assert len(model.depth_to_image("x", Image.new("L", (1, 65535), 9), steps=1, width=64, height=64)) == 1


@pytest.fixture(scope="module")
def estimator(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpt")
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_the_estimate_is_that_of_transformers(estimator):
    image = picture(80, 50)
    ours = estimate(estimator, image)
    assert ours.mode == "I;16" and ours.size == (80, 50)
    found = np.asarray(ours, dtype=np.float64) / 65535
    theirs = pipeline("depth-estimation", model=str(estimator))(image)["predicted_depth"].double()
    expected = ((theirs - theirs.min()) / (theirs.max() - theirs.min())).numpy()
    assert found.min() == 0 and found.max() == 1
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999 and np.abs(found - expected).max() < 0.02


def test_an_estimate_is_a_depth_map(estimator, model):
    depth = estimate(estimator, picture())
    (drawn,) = model.depth_to_image("x", depth, steps=1, width=96, height=64)
    assert np.array_equal(np.asarray(read_levels(drawn.request.depth)), np.asarray(depth, dtype=np.float32))


def test_folders_that_are_no_estimator(estimator, tmp_path):
    with pytest.raises(LdmError, match=r"found no config.json of a model there"):
        estimate(tmp_path / "absent", picture())
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(LdmError, match="names no depth-estimation model"):
        estimate(tmp_path, picture())
    config = json.loads((estimator / "config.json").read_text())
    for broken in (config, config | {"model_type": "x"}, config | {"hidden_size": "a"}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(LdmError, match="cannot be loaded as a depth-estimation model") as failure:
            estimate(tmp_path, picture())
        assert "\n" not in str(failure.value)


def test_a_pipeline_of_diffusers_has_its_estimator_inside(estimator, tmp_path):
    for name, files in (("depth_estimator", ("config.json", "model.safetensors")),
                        ("feature_extractor", ("preprocessor_config.json",))):  # fmt: skip
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((estimator / file).read_bytes())
    assert np.array_equal(np.asarray(estimate(tmp_path, picture())), np.asarray(estimate(estimator, picture())))

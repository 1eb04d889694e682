"""The x4 upscaler: diffusers' pipeline, exact sizes, and a noise of each picture's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from theirs import asked, assert_equal, final_latents, networks

from ldm.diffusion.noise import start_noise
from ldm.errors import LdmError
from ldm.models.presets import sd1, sd_x4_upscaler, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks import run
from ldm.tasks.common import other_seed
from ldm.types import Conditioning

BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd_x4_upscaler()))


def picture(width: int = 24, height: int = 16) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def asking(**fields: Any) -> GenerateRequest:
    given = {"prompt": "a red apple", "image": picture_bytes(picture()), "steps": 4, "seed": 5}
    return GenerateRequest(**given | fields)


@pytest.mark.parametrize(("level", "guidance"), [(20, 4.0), (350, 1.0), (0, 4.0)])
def test_it_equals_diffusers(level, guidance, model):
    request = asking(negative="blurry", upscale_noise=level, guidance=guidance, sampler="ddim", count=2)
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        **networks(model, **BETAS), low_res_scheduler=diffusers.DDPMScheduler(**BETAS)
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = [
        pipeline(
            **asked(model, request),
            image=picture(),
            noise_level=level,
            latents=start_noise((4, 16, 24), [seed]),
            generator=torch.Generator().manual_seed(other_seed(request.changed(seed=seed))),
        ).images
        for seed in (5, 6)
    ]
    assert_equal(final_latents(model, request), torch.cat(theirs))


@pytest.mark.parametrize("size", [(24, 16), (23, 17), (1, 1), (1, 40)])
def test_the_result_is_four_times_as_large(size, model):
    (drawn,) = model.upscale("", picture(*size), steps=2)
    assert drawn.image.size == (4 * size[0], 4 * size[1])
    assert drawn.request.width is None and drawn.request.strength is None  # so that it can be asked again
    assert drawn.request.changed() == drawn.request


def test_the_margin_repeats_the_edge(model):
    seen: list[torch.Tensor] = []
    unet = model.unet

    def watching(x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        assert cond.concat is not None and cond.vector is not None
        assert cond.vector.tolist() == [0, 0]
        seen.append(cond.concat)
        return unet(x, timestep, cond)

    watched = replace(model, unet=watching)  # pyright: ignore[reportArgumentType]
    watched.upscale("", picture(3, 9), steps=2, upscale_noise=0)
    shown = seen[0]
    assert shown.shape == (2, 3, 16, 8) and torch.equal(shown[0], shown[1])
    expected = torch.from_numpy(np.pad(np.asarray(picture(3, 9)), ((0, 7), (0, 5), (0, 0)), mode="edge")).float()
    assert (shown[0] - (expected.permute(2, 0, 1) / 127.5 - 1)).abs().max() < 0.06  # sigma is 0.01 at level 0


def test_a_picture_of_several_equals_its_seed_alone(model):
    several, alone = final_latents(model, asking(count=3, sampler="euler-a")), asking(seed=7, sampler="euler-a")
    torch.testing.assert_close(several[2:], final_latents(model, alone), rtol=1e-4, atol=1e-4)
    events = list(run(model, asking(count=2)))
    assert [event.index for event in events if isinstance(event, Picture)] == [0, 1]
    assert {event.first for event in events if isinstance(event, Progress)} == {0, 1}
    assert [event.seed for event in events if isinstance(event, Picture)] == [5, 6]


def test_the_noise_over_the_picture_is_not_the_start_noise():
    request = asking()
    start, other = start_noise((3, 16, 24), [5]), start_noise((3, 16, 24), [other_seed(request)])
    assert abs(float((start * other).mean())) < 0.1
    assert 0 <= other_seed(request.changed(seed=2**63 - 1)) < 2**63


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 128}, "width: found 128, expected 96, four times the picture's"),
        ({"height": 128}, "height: found 128, expected 64"),
        ({"strength": 0.5}, "strength: found together with the x4 upscaler"),
        ({"mask": picture_bytes(picture())}, "mask: found together with the x4 upscaler"),
        ({"refine_at": 0.5}, "refine_at: found together with the x4 upscaler"),
        ({"image": picture_bytes(picture(1, 65535))}, "image: found 1x65535, expected sides of at most 2048"),
        ({"image": picture_bytes(picture(1500, 1500))}, "image: found 1500x1500, expected sides .* 1048576 pixels"),
    ],
)
def test_what_it_cannot_be_asked(fields, message, model):
    with pytest.raises(LdmError, match=message):
        list(run(model, asking(**fields)))


def test_the_size_may_be_named(model):
    assert next(iter(run(model, asking(width=96, height=64, steps=2)))).steps == 2  # pyright: ignore


def test_it_needs_a_picture_and_the_right_model(model):
    with pytest.raises(LdmError, match=r"3 extra channels .*; give a small picture, as `ldm upscale` does"):
        model.generate("x")
    with pytest.raises(LdmError, match="model: is no upscaler, expected the x4 upscaler"):
        random_system(tiny(sd1())).upscale("", picture())
    with pytest.raises(LdmError, match="image: found a truncated or damaged picture"):
        model.upscale("", picture_bytes(picture())[:-30])

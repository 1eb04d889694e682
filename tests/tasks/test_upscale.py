"""The upscalers: diffusers' pipeline or a loop written by hand, exact sizes, and a noise of each picture's own."""

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
from ldm.models.presets import sd1, sd_x4_upscaler, small_upsampler, tiny
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
        ({"width": 128}, "width: found 128, expected 96, 4 times the picture's"),
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


@pytest.fixture(scope="module")
def ours() -> LatentDiffusion:
    drawn = random_system(tiny(small_upsampler()))
    drawn.autoencoder.load_state_dict({"deviation": torch.linspace(0.02, 0.3, 12)})
    return drawn


@torch.inference_mode()
@pytest.mark.parametrize("level", [0, 60])
def test_our_upsampler_equals_a_loop_by_hand(level, ours):
    """DDIM (Song et al. 2020, eq. 12) in its own scale, on v, with numpy's layout of the blocks."""
    (drawn,) = ours.upscale("", picture(), steps=4, seed=5, sampler="ddim", upscale_noise=level)
    betas = np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2
    kept = float(np.cumprod(1 - betas)[level])
    noise = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(other_seed(asking())))
    small = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1).float() / 127.5 - 1
    seen = (kept**0.5 * small + (1 - kept) ** 0.5 * noise)[None]
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = torch.randn(12, 16, 24, generator=torch.Generator().manual_seed(5))[None]
    timesteps = [751, 501, 251, 1]
    for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        a, after = float(alphas[timestep]), float(alphas[following])
        v = ours.unet(x, torch.tensor([float(timestep)]), Conditioning(concat=seen, vector=torch.tensor([level])))
        x0, eps = a**0.5 * x - (1 - a) ** 0.5 * v, a**0.5 * v + (1 - a) ** 0.5 * x
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    blocks = (x[0].double().numpy() * np.linspace(0.02, 0.3, 12)[:, None, None]).reshape(3, 2, 2, 16, 24)
    details = blocks.transpose(0, 3, 1, 4, 2).reshape(3, 32, 48)
    enlarged = torch.nn.functional.interpolate(
        seen.double() / kept**0.5, size=(32, 48), mode="bicubic", antialias=True
    )[0].numpy()
    expected = ((np.clip(details + enlarged, -1, 1) + 1) * 127.5).round().transpose(1, 2, 0)
    assert np.abs(details).max() > 0.1, "what the network adds is seen"
    assert np.abs(np.asarray(drawn.image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(24, 16), (23, 17), (1, 1), (1, 40)])
def test_ours_draws_twice_as_large(size, ours):
    (drawn,) = ours.upscale("", picture(*size), steps=2)
    assert drawn.image.size == (2 * size[0], 2 * size[1])
    assert drawn.request.guidance == 1 and drawn.request.changed() == drawn.request


def test_ours_draws_several_each_from_its_seed(ours):
    image = picture()
    several = ours.upscale("", image, steps=2, count=2, seed=5, upscale_noise=90)
    (alone,) = ours.upscale("", image, steps=2, seed=6, upscale_noise=90)
    differ = np.abs(np.asarray(several[1].image).astype(int) - np.asarray(alone.image))
    assert differ.max() <= 1 and [one.seed for one in several] == [5, 6] and [one.index for one in several] == [0, 1]
    assert np.abs(np.asarray(several[0].image).astype(int) - np.asarray(alone.image)).mean() > 2


def test_what_ours_cannot_be_asked(ours):
    (drawn,) = ours.upscale("a red apple", picture(), steps=2)
    assert drawn.notes == ("prompt: this model takes no text; it did not act",)
    with pytest.raises(LdmError, match="upscale_noise: found 101, expected 0 to 100, the levels that this model knows"):
        ours.upscale("", picture(), upscale_noise=101)
    with pytest.raises(LdmError, match="strength: found together with the x2 upscaler"):
        ours.upscale("", picture(), strength=0.5)
    with pytest.raises(LdmError, match="width: found 96, expected 48, 2 times the picture's"):
        ours.upscale("", picture(), width=96)

"""Inversion of a picture, what its pair gives back, and variations that begin in it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.prediction import from_denoised
from ldm.diffusion.state import vp_scale
from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2_unclip, small_decoder, tiny
from ldm.pipeline.first_stage import decode
from ldm.pipeline.images import picture_bytes, read_picture, to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.prepare import resolve, sigmas_for
from ldm.pipeline.request import GenerateRequest, PriorUse
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks import run
from ldm.tasks.frames import GIVES_BACK, Frame, draw_frames
from ldm.tasks.invert import invert, inverting
from ldm.types import Conditioning

C2 = 0.8


@pytest.fixture(scope="module", params=[small_decoder, sd2_unclip], ids=["ours", "sd2-unclip"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return random_system(tiny(request.param()))


def picture(width: int = 64, height: int = 64, seed: int = 0) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return picture_bytes(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**(GIVES_BACK | {"prompt": "", "steps": 12, "seed": 5} | fields))


def ideal(model: LatentDiffusion) -> LatentDiffusion:
    """The model with the exact denoiser of Gaussian data N(mu, C2), mu the mean of what it is told as a vector."""
    schedule, prediction = model.schedule, model.config.prediction

    def network(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        sigma = schedule.sigma(timestep.double())
        state = x / vp_scale(sigma).to(x)[:, None, None, None]
        variance = sigma.to(x)[:, None, None, None] ** 2
        mu = mean_told(cond)
        denoised = mu + C2 / (C2 + variance) * (state - mu)
        return from_denoised(prediction, denoised, state, sigma)

    return replace(model, unet=network)  # pyright: ignore[reportArgumentType]


def mean_told(cond: Conditioning) -> Tensor:
    assert cond.vector is not None
    return cond.vector.mean(dim=1)[:, None, None, None]


def told(model: LatentDiffusion) -> tuple[LatentDiffusion, list[Conditioning]]:
    """The model, and what its U-Net is told from now on."""
    heard: list[Conditioning] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        heard.append(cond)
        return model.unet(x, timestep, cond)

    return replace(model, unet=watching), heard  # pyright: ignore[reportArgumentType]


def parts(cond: Conditioning) -> tuple[Tensor, Tensor]:
    assert cond.vector is not None and cond.cross is not None
    return cond.vector, cond.cross


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int16)


def psnr(a: Image.Image, b: Image.Image) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(((levels(a) - levels(b)) ** 2.0).mean())))


def through_the_autoencoder(model: LatentDiffusion, data: bytes) -> Image.Image:
    """All that can be given back of a picture: decoded from its own latent."""

    return to_image(decode(model.autoencoder, model.latent_of(read_picture(data)))[0][0])


def test_the_noise_of_gaussian_data_is_known(model):
    """(x - mu) / sqrt(C2 + sigma^2) stays; the end of DDIM's levels stands for the latent itself."""
    pair = invert(ideal(model), picture(), asking(steps=150))
    mu = mean_told(model.tell_image(model.encode_prompt(""), model.image_embedding(picture())))
    levels = sigmas_for(model, pair.request)
    low, high = float(levels[-1]), float(levels[0])
    with torch.inference_mode():
        latent = model.latent_of(read_picture(picture()))
    start = latent * math.sqrt(1 + low**2)
    end = mu + math.sqrt((C2 + high**2) / (C2 + low**2)) * (start - mu)
    torch.testing.assert_close(pair.noise, end / math.sqrt(1 + high**2), rtol=0.01, atol=0.02)
    assert torch.equal(pair.embedding, model.image_embedding(picture()))


def test_the_pair_gives_the_picture_back(model):
    """The error that is left falls with the steps, by the order that one refinement brings."""
    exact = ideal(model)
    original = through_the_autoencoder(model, picture())

    def missing(steps: int) -> float:
        request = resolve(model, asking(steps=steps))
        pair = invert(exact, picture(), request)
        (drawn,) = (
            e for e in draw_frames(exact, [Frame(pair.request, pair.embedding, pair.noise)]) if isinstance(e, Picture)
        )
        return psnr(drawn.image, original)

    few, many = missing(10), missing(40)
    assert few > 25 and many > few + 8


def test_eta_0_is_the_same_twice_and_eta_frees_it(model):
    fields = {"vary": picture(), "vary_inverted": True, "count": 2, "steps": 2}
    still = [e.image for e in run(model, asking(**fields)) if isinstance(e, Picture)]
    again = [e.image for e in run(model, asking(**fields, seed=77)) if isinstance(e, Picture)]
    assert all(np.array_equal(levels(still[0]), levels(one)) for one in (*still, *again))
    moved = []
    for eta in (0.3, 1.0):
        first, second = (e.image for e in run(model, asking(**fields, eta=eta)) if isinstance(e, Picture))
        assert not np.array_equal(levels(first), levels(second))
        moved.append(np.abs(levels(first) - levels(still[0])).mean())
    assert 0 < moved[0] < moved[1]


def test_a_variation_of_several_equals_its_seed_alone(model):
    fields = {"vary": picture(), "vary_inverted": True, "steps": 4, "eta": 0.8}
    several = [e for e in run(model, asking(**fields, count=3)) if isinstance(e, Picture)]
    (alone,) = (e for e in run(model, asking(**fields, seed=7)) if isinstance(e, Picture))
    assert [e.seed for e in several] == [5, 6, 7] and [e.index for e in several] == [0, 1, 2]
    assert np.array_equal(levels(several[2].image), levels(alone.image))
    assert several[2].request.changed(seed=7) == alone.request and alone.notes == ()


def test_inversion_hears_the_picture_and_no_text(model):
    watched, heard = told(model)
    request = asking(prompt="a pear", guidance=4.0, steps=2, vary=picture(), vary_inverted=True)
    assert len([e for e in run(watched, request) if isinstance(e, Picture)]) == 1
    z = model.image_embedding(picture())
    silent = parts(model.tell_image(model.encode_prompt("", width=64, height=64), z))
    spoken = parts(model.tell_image(model.encode_prompt("a pear", width=64, height=64), z))
    for cond in heard[:2]:  # without guidance there is no other side
        torch.testing.assert_close(parts(cond), silent)
    vector, cross = parts(heard[-1])
    torch.testing.assert_close((vector[:1], cross[:1]), spoken)
    torch.testing.assert_close((vector[1:], cross[1:]), parts(model.encode_prompt("", width=64, height=64)))


def test_the_size_is_that_of_the_picture(model):
    pair = invert(model, picture(96, 48), asking(steps=1))
    assert (pair.request.width, pair.request.height) == (88, 64)
    assert pair.noise.shape == (1, *model.latent_shape(88, 64))
    chosen = invert(model, picture(96, 48), asking(steps=1, width=64, height=72))
    assert chosen.noise.shape == (1, *model.latent_shape(64, 72))


def test_each_step_is_progress_of_a_picture_not_begun(model):
    events = list(inverting(model, picture(), asking(steps=3), refinements=0))
    assert {(e.first, e.count, e.done) for e in events} == {(0, 1, 0)} and all(e.step is not None for e in events)
    drawn = list(run(model, asking(steps=3, vary=picture(), vary_inverted=True)))
    assert [type(e) for e in drawn[:3]] == [Progress] * 3 and isinstance(drawn[-1], Picture)


def test_the_method(model):
    pair = model.invert(picture(), steps=2)
    assert (pair.request.sampler, pair.request.guidance, pair.request.steps) == ("ddim", 1.0, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "euler"}, "sampler: found euler, expected ddim"),
        ({"count": 2}, "count: found 2, expected 1"),
        ({"variation_strength": 0.5}, "variation_strength: found, expected 0"),
        ({"image": picture()}, "image: found together with a sequence of embeddings"),
        ({"vary": picture()}, "vary: found together with a sequence of embeddings"),
        ({"prior": PriorUse()}, "prior: found together with a sequence of embeddings"),
    ],
)
def test_what_it_does_not_take(fields, message, model):
    with pytest.raises(LdmError, match=message):
        invert(model, picture(), asking(**fields))


def test_what_a_request_cannot_be():
    with pytest.raises(LdmError, match="vary_inverted: found with sampler euler, expected ddim"):
        asking(vary=picture(), vary_inverted=True, sampler="euler")
    with pytest.raises(LdmError, match="vary_inverted: found without vary"):
        asking(vary_inverted=True)


def test_a_model_that_takes_no_picture():
    with pytest.raises(LdmError, match="takes no picture"):
        invert(random_system(tiny(sd1())), picture(), asking())


def test_numbers_that_are_not_finite(model):
    def broken(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return torch.full_like(x, math.nan)

    with pytest.raises(LdmError, match=r"inversion: step 1 of 12 .* not finite"):
        invert(replace(model, unet=broken), picture(), asking())  # pyright: ignore[reportArgumentType]

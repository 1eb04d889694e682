"""Image to image: exactly so many steps, from exactly that state, of exactly that picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.noise import start_noise
from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.images import picture_bytes, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.prepare import last_steps, sigmas_for
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import img2img, run
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class Watching:
    """The model's U-Net, every state that it was shown kept."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.unet, self.shown = model.unet, list[tuple[Tensor, float]]()

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.shown.append((x, float(timestep[0])))
        return self.unet(x, timestep, cond)


@pytest.mark.parametrize(
    ("strength", "steps", "run_steps"), [(0.05, 20, 1), (0.5, 20, 10), (0.29, 100, 29), (0.75, 10, 7), (1.0, 6, 6)]
)
def test_strength_is_exact_to_the_step(strength, steps, run_steps, model):
    unet = Watching(model)
    watched = replace(model, unet=unet)  # pyright: ignore[reportArgumentType]
    fields = {"strength": strength, "steps": steps, "sampler": "euler", "guidance": 1.0}
    watched.image_to_image("x", picture(), **fields)
    assert len(unet.shown) == run_steps


def test_it_begins_with_the_picture_under_its_own_noise(model):
    unet = Watching(model)
    watched = replace(model, unet=unet)  # pyright: ignore[reportArgumentType]
    fields = {"strength": 0.5, "steps": 8, "sampler": "ddim", "guidance": 1.0, "seed": 5, "count": 2}
    drawn = watched.image_to_image("x", picture(), **fields)
    sigma = float(last_steps(sigmas_for(model, drawn[0].request), 4)[0])
    latent = model.autoencoder.encode(to_tensor(picture())[None])
    expected = (latent + sigma * start_noise((4, 8, 8), [5, 6])) / (1 + sigma**2) ** 0.5
    assert torch.allclose(unet.shown[0][0], expected, atol=1e-5)
    assert unet.shown[0][1] == 376  # the fifth of leading's eight: 3 * 125 + 1


def test_a_picture_of_a_batch_equals_the_same_seed_alone(model):
    fields = {"strength": 0.6, "steps": 5, "sampler": "euler-a"}
    batch = model.image_to_image("x", picture(), seed=3, count=3, **fields)
    alone = model.image_to_image("x", picture(), seed=5, **fields)[0]
    assert np.abs(np.asarray(batch[2].image, dtype=int) - np.asarray(alone.image, dtype=int)).max() <= 1


def test_the_denoiser_that_knows_the_answer_gives_the_picture_back(model):
    """Whatever the strength: if the network always points at one latent, its decoding is what comes out."""
    latent = model.autoencoder.encode(to_tensor(picture())[None])

    def oracle(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return latent.expand(len(x), -1, -1, -1)

    knowing = replace(model, unet=oracle, config=replace(model.config, prediction="x0"))  # pyright: ignore
    plain = knowing.generate("x", steps=3, seed=1)[0].image
    for strength in (0.4, 1.0):
        redrawn = knowing.image_to_image("x", picture(), steps=5, strength=strength, seed=2)[0].image
        assert np.abs(np.asarray(redrawn, dtype=int) - np.asarray(plain, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("size", "fields", "shape"),
    [
        ((300, 300), {}, (64, 64)),
        ((400, 200), {}, (88, 64)),
        ((400, 200), {"width": 128, "height": 64}, (128, 64)),
        ((31, 97), {"width": 72}, (72, 112)),
    ],
)
def test_sizes(size, fields, shape, model):
    drawn = model.image_to_image("x", picture(size), steps=2, strength=0.5, **fields)[0]
    assert drawn.image.size == shape == (drawn.request.width, drawn.request.height)


def test_what_is_refused(model):
    with pytest.raises(LdmError, match=r"strength: 0.01 of 24 steps is less than one step"):
        model.image_to_image("x", picture(), strength=0.01)
    with pytest.raises(LdmError, match="image: found none"):
        list(img2img(model, GenerateRequest(prompt="x")))
    with pytest.raises(LdmError, match="image: found a web page"):
        model.image_to_image("x", b"<html>")


def test_the_task_follows_from_the_fields(model):
    request = GenerateRequest(prompt="x", steps=4, strength=0.5, image=picture_bytes(picture()))
    assert [e.steps for e in run(model, request) if isinstance(e, Progress)] == [2, 2, 2]

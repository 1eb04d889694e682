"""Text to image: a picture depends on its request and its own seed, and on nothing else."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, small, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.types import Conditioning


def tiny_small() -> SystemConfig:
    """At its own size: at 64 its deepest level would be one pixel, where norms over two numbers are all but signs."""
    return replace(tiny(small()), size=128)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny_small())


def final_state(model: LatentDiffusion, **fields: object) -> Tensor:
    """The state after the last step, (B, z, h, w)."""
    request = GenerateRequest(**{"prompt": "a red apple", "steps": 5} | fields)
    return torch.cat(
        [e.step.x for e in run(model, request) if isinstance(e, Progress) and e.step and e.done == e.steps]
    )


@pytest.mark.parametrize("config", [tiny(sd1()), tiny(sdxl()), tiny_small()], ids=["sd1", "sdxl", "small"])
def test_a_picture_of_a_batch_equals_the_same_seed_alone(config):
    model = random_system(config)
    batch = final_state(model, seed=7, count=3)
    for index in range(3):
        alone = final_state(model, seed=7 + index)
        assert (batch[index] - alone[0]).abs().max() <= 1e-4 * alone.abs().max()
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


@pytest.mark.parametrize("sampler", ["euler-a", "dpmpp-2m-sde", "dpmpp-sde", "ddpm", "lcm"])
def test_so_does_one_whose_steps_draw_noise(sampler, model):
    batch = final_state(model, seed=7, count=2, sampler=sampler)
    alone = final_state(model, seed=8, sampler=sampler)
    assert torch.allclose(batch[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "euler-a"])
def test_the_same_seed_twice_is_the_same_to_the_bit(sampler, model):
    first, second = (final_state(model, seed=2**63 - 1, sampler=sampler) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_batches_are_close():
    """The default on CPUs that have it; its rounding depends on the batch."""
    model = random_system(tiny(small()), dtype=torch.bfloat16)
    model = replace(model, text=tuple(tower.float() for tower in model.text))  # pyright: ignore[reportAttributeAccessIssue]
    batch, alone = final_state(model, seed=7, count=3), final_state(model, seed=9)
    assert (batch[2:] - alone).abs().max() < 0.05 * alone.abs().max()


def test_two_threads_on_one_model_equal_two_runs(model):
    requests = [{"seed": 1, "prompt": "a pear"}, {"seed": 2, "sampler": "euler-a", "count": 2}]
    expected = [final_state(model, **fields) for fields in requests]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = final_state(model, **requests[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


def test_global_generators_are_neither_read_nor_moved(model):
    torch.manual_seed(1)
    first, state = final_state(model, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(final_state(model, seed=3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_seed_is_recorded_and_repeats(model):
    pictures = [model.generate("x", steps=1, seed=seed)[0] for seed in (None, -1)]
    seeds = [picture.request.seed for picture in pictures]
    assert seeds[0] != seeds[1] and all(seed is not None and 0 <= seed < 2**32 for seed in seeds)
    again = model.generate("x", steps=1, seed=seeds[0])[0]
    assert np.array_equal(np.asarray(again.image), np.asarray(pictures[0].image))


def test_nothing_is_left_to_a_default(model):
    request = model.generate("x", steps=1)[0].request
    assert (request.width, request.height, request.schedule, request.count) == (128, 128, "karras", 1)


def test_zero_terminal_snr_chooses_a_schedule_that_begins_at_the_end():
    model = random_system(replace(tiny(sd2("v")), zero_terminal_snr=True))
    picture = model.generate("x", steps=2)[0]
    assert picture.request.schedule == "trailing" and picture.notes == ()


def test_prompt_negative_and_guidance_matter(model):
    base = final_state(model, seed=1)
    for change in ({"prompt": "a pear"}, {"negative": "red"}, {"guidance": 7.0}, {"rescale": 0.5}, {"clip_skip": 1}):
        assert not torch.allclose(final_state(model, seed=1, **change), base, atol=1e-3)


def test_guidance_1_asks_the_network_once_and_never_for_the_negative(model):
    assert torch.equal(final_state(model, guidance=1, seed=1), final_state(model, guidance=1, negative="red", seed=1))
    sizes: list[int] = []

    def counting(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        sizes.append(len(x))
        return model.unet(x, timestep, cond)

    watched = replace(model, unet=counting)  # pyright: ignore[reportArgumentType]
    final_state(watched, guidance=1, seed=1, steps=2, sampler="euler")
    assert sizes == [1, 1]
    final_state(watched, guidance=2, seed=1, steps=2, sampler="euler")
    assert sizes == [1, 1, 2, 2]


@pytest.mark.parametrize(("width", "height"), [(72, 64), (104, 88), (64, 136)])
def test_sizes_that_do_not_divide_evenly(width, height, model):
    assert model.generate("x", steps=1, width=width, height=height)[0].image.size == (width, height)


def test_an_inpainting_model_gets_a_full_mask():
    model = random_system(tiny(sd1(in_channels=9)))
    seen: list[Tensor | None] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        seen.append(cond.concat)
        return model.unet(x, timestep, cond)

    watched = replace(model, unet=watching)  # pyright: ignore[reportArgumentType]
    (picture,) = watched.generate("x", steps=1, seed=0)
    assert picture.notes == ("this is an inpainting model: all of the picture is masked",)
    (channels,) = seen
    assert channels is not None and channels.shape == (2, 5, 8, 8) and (channels[:, :1] == 1).all()
    grey = model.autoencoder.encode(torch.zeros(1, 3, 64, 64))
    assert torch.allclose(channels[:1, 1:], grey, atol=1e-5)


@pytest.mark.parametrize("preset", [lambda: sd2(in_channels=5), sd_x4_upscaler], ids=["depth", "x4"])
def test_a_model_that_needs_more_than_text_is_refused(preset):
    with pytest.raises(LdmError, match=r"its U-Net takes (1|3) extra channels .*use another checkpoint"):
        random_system(tiny(preset())).generate("x", steps=1)


def test_what_does_not_fit_into_the_text_encoder_is_said(model):
    chunks = "a " * (16 * 75)
    (picture,) = model.generate(chunks + "red apple", negative=chunks + "pear", steps=1)
    assert picture.notes == (
        'prompt: too long; left out from here on: "red apple"',
        'negative: too long; left out from here on: "pear"',
    )


def test_clip_skip_beyond_the_tower(model):
    with pytest.raises(LdmError, match="clip_skip: found 9, expected 1 to 2"):
        model.generate("x", clip_skip=9)


def test_wrong_fields_are_refused_before_anything_runs(model):
    with pytest.raises(LdmError, match='"step": no such field; did you mean steps\\?'):
        model.generate("x", step=3)
    events = run(model, GenerateRequest(prompt="x", steps=1))
    assert [type(event) for event in events] == [Progress, Progress, Picture]

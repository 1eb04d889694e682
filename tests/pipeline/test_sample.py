"""THE loop: its events, its batches, and what it does when numbers or memory fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.sigmas import SCHEDULES
from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline import sample
from ldm.pipeline.device import is_out_of_memory
from ldm.pipeline.first_stage import decode
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.request import GenerateRequest, SamplerName, ScheduleName
from ldm.pipeline.sample import Progress, batch_size
from ldm.samplers import SAMPLERS
from ldm.tasks import run
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


class Failing(nn.Module):
    """A network that does something wrong at its n-th call (counted from 1), once."""

    def __init__(self, network: nn.Module, call: int, fail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.call, self.fail, self.calls = network, call, fail, 0

    def forward(self, *arguments: Any) -> Tensor:
        self.calls += 1
        output = self.network(*arguments)
        return self.fail(output) if self.calls == self.call else output


def not_finite(output: Tensor) -> Tensor:
    output[-1, 0, 0, 0] = torch.nan
    return output


def no_memory(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def with_unet(model: LatentDiffusion, call: int, fail: Callable[[Tensor], Tensor]) -> tuple[LatentDiffusion, Failing]:
    unet = Failing(model.unet, call, fail)
    return replace(model, unet=unet), unet  # pyright: ignore[reportArgumentType]


def test_events(model):
    events = list(run(model, GenerateRequest(prompt="x", steps=3, count=2, seed=4)))
    steps, pictures = events[:4], events[4:]
    assert [(e.first, e.count, e.done, e.steps) for e in steps if isinstance(e, Progress)] == [
        (0, 2, done, 3) for done in range(4)
    ]
    for event in steps[1:]:
        assert isinstance(event, Progress) and event.step is not None and event.step.denoised.shape == (2, 4, 8, 8)
    assert [(p.index, p.seed, p.request.count) for p in pictures if isinstance(p, Picture)] == [
        (0, 4, 1), (1, 5, 1),
    ]  # fmt: skip


def test_a_caller_may_stop_between_steps(model):
    counting, unet = with_unet(model, 0, not_finite)
    events = run(counting, GenerateRequest(prompt="x", steps=9, sampler="euler"))
    next(events), next(events), next(events)
    events.close()
    assert unet.calls == 2


@pytest.mark.parametrize("call", [1, 3])
def test_a_step_that_is_not_finite_is_named(call, model):
    broken, _ = with_unet(model, call, not_finite)
    with pytest.raises(LdmError, match=f"^denoising: step {call} of 4 \\(sigma .*not finite") as caught:
        broken.generate("x", steps=4, sampler="euler")
    assert "\n" not in str(caught.value)


def test_text_states_that_are_not_finite(model):
    broken = random_system(tiny(sd1()))
    weights = next(p for p in broken.text[0].parameters() if p.shape == (32,))  # pyright: ignore
    weights.data[:] = torch.nan
    with pytest.raises(LdmError, match=r"^text encoder: its states are not finite"):
        broken.generate("x", steps=1)


class Overflowing(nn.Module):
    """An autoencoder's decoder whose values leave half precision's range on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x[:, :3] * 60_000 * 60_000 / 60_000 / 60_000, scale_factor=8)


def half_autoencoder() -> Any:
    autoencoder = random_system(tiny(sd1()), dtype=torch.float16).autoencoder
    autoencoder.decoder = Overflowing()
    return autoencoder


def test_an_overflow_is_decoded_again_in_float32():
    autoencoder = half_autoencoder()
    latents = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        assert not torch.isfinite(autoencoder.decode(latents.half() * 10)).all()
        pixels, notes = decode(autoencoder, latents * 10)
    assert torch.isfinite(pixels).all() and pixels.abs().max() <= 1
    assert notes == ("decoded in float32, since the autoencoder overflowed in float16",)
    assert next(autoencoder.parameters()).dtype == torch.float16


def test_never_a_black_picture(model):
    broken = random_system(tiny(sd1()))
    broken.autoencoder.post_quant_conv.bias.data[0] = torch.inf
    with pytest.raises(LdmError, match=r"^autoencoder: the decoded picture is not finite"):
        broken.generate("x", steps=1)


def test_a_picture_of_one_colour_is_flagged(model):
    grey = random_system(tiny(sd1()))
    grey.autoencoder.decoder.conv_out.weight.data.zero_()
    assert grey.generate("x", steps=1)[0].notes == ("the picture is of one colour",)
    assert model.generate("x", steps=1)[0].notes == ()


@pytest.mark.parametrize("call", [1, 2])
def test_out_of_memory_halves_the_batch(call, model):
    """At whichever network call it happens, every picture comes once, and is the one it would have been."""
    wanted = {"steps": 2, "count": 5, "seed": 3, "sampler": "euler"}
    expected = model.generate("x", **wanted)
    short, unet = with_unet(model, call, no_memory)
    pictures = short.generate("x", **wanted)
    assert [p.index for p in pictures] == list(range(5)) and unet.calls > 2
    for ours, theirs in zip(pictures, expected, strict=True):
        assert np.abs(np.asarray(ours.image, dtype=int) - np.asarray(theirs.image, dtype=int)).max() <= 1


def test_out_of_memory_while_decoding_repeats_no_picture(model):
    broken, request = random_system(tiny(sd1())), GenerateRequest(prompt="x", steps=1, count=4, seed=0)
    broken.autoencoder.decoder = Failing(broken.autoencoder.decoder, 2, no_memory)  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:  # in tiles there is no room either
        patch.setattr("ldm.pipeline.first_stage.decode_tiled", lambda *_: no_memory(torch.empty(0)))
        events = list(run(broken, request))
    assert [e.index for e in events if isinstance(e, Picture)] == [0, 1, 2, 3]
    assert [(e.first, e.count) for e in events if isinstance(e, Progress) and not e.done] == [(0, 4), (1, 2), (3, 1)]


def test_no_memory_for_one_picture_says_what_to_do(model):
    class Never(nn.Module):
        def forward(self, *_: Any) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(LdmError, match="no memory left on cpu for one picture of 64x64; make it smaller"):
        replace(model, unet=Never(), dtype=torch.float32).generate("x", steps=1, count=3)  # pyright: ignore
    assert len(model.generate("x", steps=1)) == 1  # the next request is served


def test_other_errors_are_not_taken_for_it(model):
    def bug(_: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        with_unet(model, 1, bug)[0].generate("x", steps=1, count=2)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(64, 64, 8), (512, 512, 8), (768, 768, 3), (1024, 1024, 2), (2048, 1536, 1)]
)
def test_batch_size(width, height, size):
    assert batch_size(GenerateRequest(prompt="x", width=width, height=height)) == size


def test_many_pictures_are_drawn_in_batches(model, monkeypatch):
    monkeypatch.setattr(sample, "MAX_BATCH", 2)
    events = list(run(model, GenerateRequest(prompt="x", steps=1, count=5, seed=1)))
    assert [(e.first, e.count) for e in events if isinstance(e, Progress) and not e.done] == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_at_few_steps(sampler: SamplerName, model):
    for steps in (1, 2, 3):
        (picture,) = model.generate("x", sampler=sampler, steps=steps, seed=0)
        assert picture.image.size == (64, 64) and picture.notes == ()


def test_lcm_runs_on_a_consistency_function(model):
    """Its answer at timestep 0, the last one of this schedule, is the state itself (Song et al. 2023, section 3)."""
    request = GenerateRequest(prompt="x", steps=3, seed=0, sampler="lcm", schedule="linspace")
    *_, before, last = [event.step for event in run(model, request) if isinstance(event, Progress) and event.step]
    assert torch.allclose(last.x, before.x * (1 + last.sigma**2) ** -0.5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_at_few_steps(schedule: ScheduleName, model):
    for steps in (1, 2, 3):
        (picture,) = model.generate("x", schedule=schedule, steps=steps, seed=0)
        assert picture.image.size == (64, 64) and picture.notes == ()


def test_as_many_steps_as_there_are_timesteps(model):
    """Only the levels are wanted here, so the network does nothing."""

    class Still(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            return torch.zeros_like(x)

    still = replace(model, unet=Still())  # pyright: ignore[reportArgumentType]
    for schedule in SCHEDULES:
        request = GenerateRequest(prompt="x", steps=1000, schedule=schedule, sampler="euler", guidance=1.0)
        assert sum(isinstance(event, Progress) for event in run(still, request)) == 1001


def test_inference_mode_does_not_leak_to_the_caller(model):
    events: Iterator[Progress | Picture] = run(model, GenerateRequest(prompt="x", steps=1))
    for _ in events:
        assert not torch.is_inference_mode_enabled()

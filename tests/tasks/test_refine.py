"""The hand-over to a refiner equals diffusers' `denoising_end` and `denoising_start`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from theirs import WatchedControl, assert_equal, final_latents
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import sd1, sdxl, sdxl_refiner, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import Control, GenerateRequest, HighRes
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.types import Conditioning

from test_pipeline_parity import LEADING, SOLVERS, their_arguments, their_pipeline, tokenizers  # isort: skip

__all__ = ["tokenizers"]  # a fixture
SEEDS = (5, 6)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sdxl()), seed=2).with_refiner(random_system(tiny(sdxl_refiner()), seed=4))


def asking(**fields: Any) -> GenerateRequest:
    given = {"prompt": "a red apple", "width": 96, "height": 64, "steps": 5, "seed": SEEDS[0], "refine_at": 0.6}
    return GenerateRequest(**given | fields)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp-2m"])
def test_it_equals_diffusers(solver, model, tokenizers):
    sampler, schedule, scheduler, settings, _ = SOLVERS[solver]
    request = asking(
        negative="blurry", sampler=sampler, schedule=schedule, guidance=6.5, count=2, original_size=(200, 160),
        crop=(16, 8),
    )  # fmt: skip
    base = their_pipeline(model, tokenizers, scheduler(**settings))
    refiner = their_pipeline(model.refiner, tokenizers, scheduler(**settings))
    refiner.register_to_config(requires_aesthetics_score=True)
    given = their_arguments(request) | {"original_size": (160, 200), "crops_coords_top_left": (8, 16)}
    latents = base(**given, denoising_end=0.6).images
    del given["width"], given["height"]
    theirs = refiner(**given, image=latents, denoising_start=0.6).images
    assert_equal(final_latents(model, request), theirs)


@pytest.mark.parametrize("fields", [{}, {"original_size": (512, 400), "crop": (32, 64)}])
def test_sizes_are_told_as_diffusers_tells_them(fields, model, tokenizers):
    _, _, scheduler, _, _ = SOLVERS["euler"]
    request = asking(sampler="euler", schedule="leading", steps=4, count=2, negative="x", refine_at=None, **fields)
    base = their_pipeline(model, tokenizers, scheduler(**LEADING))
    sizes = {"original_size": (400, 512), "crops_coords_top_left": (64, 32)} if fields else {}
    assert_equal(final_latents(model, request), base(**their_arguments(request), **sizes).images)


class Watching:
    """A model's U-Net, and at which timesteps it was asked under how many rows."""

    def __init__(self, model: LatentDiffusion) -> None:
        self.unet, self.asked = model.unet, list[tuple[float, int]]()

    def __call__(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.asked.append((float(timestep[0]), len(x)))
        return self.unet(x, timestep, cond)


def test_shares_of_the_steps_are_of_all_of_them(model):
    """Guidance from 0.3 to 0.8 of ten steps, of which the refiner has the last four."""
    first, second = Watching(model), Watching(model.refiner)
    refiner = replace(model.refiner, unet=second)
    watched = replace(model, unet=first, refiner=refiner)
    list(run(watched, asking(steps=10, sampler="euler", guidance_start=0.3, guidance_end=0.8)))
    assert [rows for _, rows in first.asked] == [1, 1, 1, 2, 2, 2]
    assert [rows for _, rows in second.asked] == [2, 2, 1, 1]
    assert first.asked[-1][0] > second.asked[0][0]
    for end, rows in ((0.5, [1, 1, 1, 1]), (1.0, [2, 2, 2, 2])):
        second.asked.clear()
        list(run(watched, asking(steps=10, sampler="euler", guidance_end=end)))
        assert [count for _, count in second.asked] == rows


@pytest.mark.parametrize(("end", "calls"), [(0.3, 3), (1.0, 6)])
def test_a_control_acts_on_the_first_model(end, calls, model):
    """For its share of all ten steps; the refiner has no network of that name."""
    watched = WatchedControl(model)
    controls = [Control(network="a", image=picture_bytes(Image.new("RGB", (30, 20))), end=end)]
    list(
        run(replace(model, controls={"a": watched}), asking(steps=10, sampler="euler", guidance=1.0, controls=controls))
    )
    assert len(watched.seen) == calls


def test_a_prompt_changes_at_its_share_of_all_steps(model):
    told: list[Tensor] = []
    refiner = model.refiner
    assert refiner is not None

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.cross is not None
        told.append(cond.cross)
        return refiner.unet(x, timestep, cond)

    watched = replace(model, refiner=replace(refiner, unet=watching))
    list(run(watched, asking(prompt="[pear:plum:0.8]", steps=10, sampler="euler", guidance=1.0)))
    expected = [refiner.encode_prompt(word).cross for word in ("pear", "pear", "plum", "plum")]
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(told, expected, strict=True))


def test_a_hand_over_to_itself_changes_nothing(model):
    """Where the sampler is of one step, and so forgets nothing."""
    alike = replace(model, refiner=model)
    whole = final_latents(model, asking(refine_at=None, sampler="euler-a"))
    torch.testing.assert_close(final_latents(alike, asking(sampler="euler-a")), whole, rtol=1e-4, atol=1e-4)


def test_it_finishes_the_second_pass(model):
    events = list(run(model, asking(steps=4, refine_at=0.5, highres=HighRes(scale=1.5, strength=1.0))))
    assert {event.steps for event in events if isinstance(event, Progress)} == {8}


def test_a_picture_of_a_batch_equals_its_seed_alone(model):
    batch, alone = final_latents(model, asking(count=2)), final_latents(model, asking(seed=6))
    torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_the_refiner_is_not_asked_for_the_models_adapters(model, monkeypatch):
    from ldm.pipeline.adapters import AppliedAdapter

    applied = AppliedAdapter.__new__(AppliedAdapter)
    object.__setattr__(applied, "name", "ink")
    tagged = replace(model, adapters=(applied,))
    plain = final_latents(model, asking(steps=4))
    stripped = final_latents(tagged, asking(steps=4, prompt="a red apple<lora:ink:1>"))
    torch.testing.assert_close(stripped, plain)


def test_what_is_refused(model):
    alone = replace(model, refiner=None)
    with pytest.raises(LdmError, match=r"refine_at: found 0.6 with a model that has no refiner.*--refiner"):
        list(run(alone, asking()))
    with pytest.raises(LdmError, match=r"refine_at: 0.05 of 5 steps leaves none for the model before the refiner"):
        list(run(model, asking(refine_at=0.05)))
    with pytest.raises(LdmError, match=r"refine_at: 1 of 5 steps leaves none for the refiner"):
        list(run(model, asking(refine_at=1.0)))
    with pytest.raises(LdmError, match=r"refine_at: 0 of 5 steps"):
        list(run(model, asking(refine_at=0.0)))


def test_other_latents_are_refused(model):
    from ldm.models.presets import sd_x4_upscaler

    with pytest.raises(LdmError, match="refiner: its latents have 4 channels at 1/4 of the size, expected 4 at 1/8"):
        model.with_refiner(random_system(tiny(sd_x4_upscaler())))
    assert random_system(tiny(sd1())).with_refiner(model).refiner is model

"""What a picture's notes say of its request: each thing that did not act, and nothing where all of it did."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.models.presets import sd1, sd_x4_upscaler, sdxl, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.notes import notes_on
from ldm.pipeline.request import Control, GenerateRequest
from ldm.tasks.refine import _within

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one black pixel
LONG = "a " * (16 * 75)
"""As many tokens as fit into the chunks."""


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "x", "steps": 10} | fields)


def notes(model: LatentDiffusion, **fields: Any) -> tuple[str, ...]:
    request = asking(**fields)
    return tuple(notes_on(model, request, [(request, request.steps)]))


def test_each_part_of_a_prompt_has_room_of_its_own(model):
    ten = "BREAK " * 9  # chunks, of sixteen
    assert notes(model, prompt=f"{ten}cat AND {ten}dog") == () == notes(model, prompt=f"[{ten}cat:{ten}dog:0.5]")
    assert notes(model, prompt=f"a pear AND [dog:{ten}{ten}cat:0.5]") == (
        'prompt: too long; left out from here on: "cat"',
    )  # fmt: skip
    assert notes(model, prompt=LONG + "AND cat", emphasis="comfy", negative=LONG + "pear") == (
        'prompt: too long; left out from here on: "and cat"',
        'negative: too long; left out from here on: "pear"',
    )


@pytest.mark.parametrize(
    ("preset", "unused"),
    [(sd1, ["original_size", "crop", "upscale_noise"]), (sdxl, ["upscale_noise"]), (sd_x4_upscaler, [])],
)
def test_fields_that_a_model_has_no_use_for(preset, unused):
    model = random_system(tiny(preset()))
    assert notes(model) == ()
    found = [note.partition(":")[0] for note in notes(model, upscale_noise=30, original_size=(9, 9), crop=(1, 0))]
    assert [name for name in found if model.config.unet.classes is None or name == "upscale_noise"] == unused


def test_guidance_for_no_step(model):
    fields = {"guidance_start": 0.31, "guidance_end": 0.39}
    assert notes(model, **fields) == ("guidance: from 0.31 to 0.39 no step begins; it did not act",)
    assert notes(model, **fields, steps=20) == () == notes(model, **fields, guidance=1.0)
    assert len(notes(model, **fields, guidance=1.0, perturbed=2.0)) == 1


def test_what_only_guidance_makes_use_of(model):
    assert notes(model, negative="y", apg={}, guidance=1.5) == () == notes(model, negative="y", rescale=0.5)
    assert notes(model, negative="y", apg={}, guidance=1.0) == (
        "negative: there is no guidance, which is 1; it did not act",
        "apg: there is no guidance, which is 1; it did not act",
    )
    assert len(notes(model, rescale=0.5, guidance=1.0)) == 1
    # Parts of a prompt are weighed against the negative one, and what perturbation adds is rescaled too.
    assert notes(model, prompt="a AND b", negative="y", guidance=1.0, perturbed=2.0, rescale=0.5) == ()


def test_a_control_that_acts_before_the_hand_over_alone(model):
    """Its share of the refiner's steps is empty, and that is no news."""
    request = asking(controls=[Control(network="a", image=PNG, end=0.6)])  # pyright: ignore[reportArgumentType]
    runs = [(_within(request, 10, 0, 6), 6), (_within(request, 10, 6, 10), 4)]
    assert tuple(notes_on(model, request, runs)) == ()
    request = asking(controls=[Control(network="a", image=PNG, start=0.62, end=0.68)])  # pyright: ignore
    runs = [(_within(request, 10, 0, 6), 6), (_within(request, 10, 6, 10), 4)]
    assert tuple(notes_on(model, request, runs)) == (
        "control a: from 0.62 to 0.68 there is no whole step; it did not act",
    )

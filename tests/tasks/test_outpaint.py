"""Outpainting: a larger picture, the old one in it bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import outpaint, run

QUICK: dict[str, Any] = {"steps": 1, "sampler": "euler", "guidance": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


far = st.sampled_from([0, 0, 1, 7, 8, 40, 150])


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    extend=st.tuples(far, far, far, far).filter(any),
    blur=st.integers(0, 16),
)
def test_the_picture_stays_within_a_larger_one(size, extend, blur, model):
    left, top, right, bottom = extend
    drawn = np.asarray(model.image_to_image("x", picture(size), extend=extend, mask_blur=blur, **QUICK)[0].image)
    assert drawn.shape == (size[1] + top + bottom, size[0] + left + right, 3)
    assert np.array_equal(drawn[top : top + size[1], left : left + size[0]], np.asarray(picture(size)))


def test_the_new_part_is_drawn_and_fades_into_the_mirror_image_of_the_old(model):
    original = np.asarray(picture(), dtype=int)
    hard, soft = (
        np.asarray(
            model.image_to_image("x", picture(), extend=(0, 0, 32, 0), mask_blur=blur, **QUICK)[0].image, dtype=int
        )
        for blur in (0, 8)
    )
    mirrored = original[:, ::-1][:, :32]
    assert np.array_equal(hard[:, 72:], soft[:, 72:])  # beyond the fade nothing is mixed
    away = [np.abs(soft[:, 64 + i] - mirrored[:, i]).mean() for i in (0, 2, 4, 6)]
    assert away[0] < 6 and away == sorted(away)
    assert np.abs(hard[:, 64] - mirrored[:, 0]).mean() > 20


def test_a_mask_of_the_picture_is_redrawn_too(model):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 24, 24))
    fields: dict[str, Any] = {"extend": (8, 0, 0, 0), "mask": picture_bytes(mask), "mask_blur": 0}
    drawn = np.asarray(model.image_to_image("x", picture(), **fields, **QUICK)[0].image)[:, 8:]
    changed = (drawn != np.asarray(picture())).any(axis=-1)
    assert changed[8:24, 8:24].mean() > 0.9
    changed[8:24, 8:24] = False
    assert not changed.any()


def test_all_steps_are_run_unless_it_is_said_otherwise(model):
    shared: dict[str, Any] = {"prompt": "x", "steps": 4, "image": picture_bytes(picture()), "extend": (0, 0, 8, 0)}
    for fields, steps in (({}, 4), ({"strength": 0.5}, 2)):
        events = list(run(model, GenerateRequest(**shared, **fields)))
        assert {event.steps for event in events if isinstance(event, Progress)} == {steps}


def test_what_is_refused(model):
    with pytest.raises(LdmError, match="extend: found none"):
        list(outpaint(model, GenerateRequest(prompt="x", image=picture_bytes(picture()))))
    with pytest.raises(LdmError, match="mask: found 8x8, expected the size of image, 64x64"):
        model.image_to_image("x", picture(), extend=(8, 0, 0, 0), mask=picture_bytes(Image.new("L", (8, 8), 255)))

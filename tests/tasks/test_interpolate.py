"""Interpolations: the ends are the pictures, the middle is told what lies on the arc, and rows share their noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.noise import start_noise
from ldm.diffusion.spherical import along_arc
from ldm.errors import LdmError
from ldm.models.presets import small_decoder, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture
from ldm.tasks.frames import GIVES_BACK, NOT_AGAIN, Frame, draw_frames
from ldm.tasks.interpolate import interpolate
from ldm.tasks.invert import invert
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(small_decoder()))


def picture(seed: int, width: int = 64, height: int = 64) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return picture_bytes(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


FIRST, SECOND = picture(1), picture(2)


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**(GIVES_BACK | {"prompt": "", "steps": 3, "seed": 5} | fields))


def drawn(model: LatentDiffusion, request: GenerateRequest, **options: Any) -> list[Picture]:
    events = interpolate(model, options.pop("pictures", (FIRST, SECOND)), request, **options)
    return [event for event in events if isinstance(event, Picture)]


def same(a: Picture, b: Picture) -> bool:
    return np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_the_ends_are_the_pictures_given_back(model):
    between = drawn(model, asking(), frames=3)
    for picture_, end in ((FIRST, between[0]), (SECOND, between[-1])):
        (back,) = model.generate(asking(vary=picture_, vary_inverted=True))
        assert same(end, back)
    assert not same(between[1], between[0]) and not same(between[1], between[2])
    assert [one.index for one in between] == [0, 1, 2]


def test_the_middle_lies_on_both_arcs(model):
    first, second = invert(model, FIRST, asking()), invert(model, SECOND, asking())
    between = drawn(model, asking(), frames=5)
    frame = Frame(
        first.request,
        along_arc(first.embedding, second.embedding, 0.75),
        along_arc(first.noise, second.noise, 0.75),
    )
    (expected,) = (e for e in draw_frames(model, [frame]) if isinstance(e, Picture))
    assert same(between[3], expected)


def test_what_the_network_is_told_goes_from_one_to_the_other(model):
    heard: list[Tensor] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        heard.append(cond.vector)
        return model.unet(x, timestep, cond)

    watched = replace(model, unet=watching)  # pyright: ignore[reportArgumentType]
    drawn(watched, asking(steps=1), frames=4, rows=(9,))
    silent = model.encode_prompt("", width=64, height=64)
    ends = [model.image_embedding(one) for one in (FIRST, SECOND)]
    for told, share in zip(heard, (0, 1 / 3, 2 / 3, 1), strict=True):
        torch.testing.assert_close(told, model.tell_image(silent, along_arc(ends[0], ends[1], share)).vector)


def test_a_row_of_a_seed_begins_in_its_noise(model):
    begun: list[Tensor] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        begun.append(x)
        return model.unet(x, timestep, cond)

    watched = replace(model, unet=watching)  # pyright: ignore[reportArgumentType]
    pictures = drawn(watched, asking(steps=1), frames=2, rows=(9, 4))
    for x, seed in zip(begun, (9, 9, 4, 4), strict=True):
        torch.testing.assert_close(x, start_noise(x.shape[1:], [seed]))
    assert [one.seed for one in pictures] == [9, 9, 4, 4]
    assert all(one.notes == (NOT_AGAIN,) for one in pictures)


def test_rows_of_both_kinds(model):
    mixed = drawn(model, asking(), frames=2, rows=(None, 9))
    assert same(mixed[0], drawn(model, asking(), frames=2)[0])
    assert same(mixed[3], drawn(model, asking(), frames=2, rows=(9,))[1])


def test_a_row_of_a_seed_takes_any_sampler_and_the_request_its_text(model):
    plain = drawn(model, asking(sampler="euler"), frames=2, rows=(1,))
    led = drawn(model, asking(sampler="euler", prompt="a pear", guidance=5.0), frames=2, rows=(1,))
    assert not same(plain[0], led[0]) and led[0].request.prompt == "a pear"


def test_the_second_picture_takes_the_shape_of_the_first(model):
    pictures = drawn(model, asking(), pictures=(picture(1, 96, 64), picture(2, 64, 96)), frames=2)
    assert {one.image.size for one in pictures} == {(80, 64)}


def test_the_method(model):
    pictures = model.interpolate(FIRST, Image.new("RGB", (50, 50), "red"), frames=2, rows=(3,), steps=1)
    assert [one.request.sampler for one in pictures] == ["ddim", "ddim"]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"frames": 1}, "frames: found 1, expected 2 or more"),
        ({}, {"rows": ()}, "rows: found none"),
        ({"sampler": "euler"}, {}, "sampler: found euler, expected ddim"),
        ({"count": 3}, {}, "count: found 3, expected 1"),
        ({"mask": FIRST, "image": FIRST}, {}, "image: found together with"),
    ],
)
def test_what_cannot_be(fields, options, message, model):
    with pytest.raises(LdmError, match=message):
        drawn(model, asking(**fields), **options)


def test_opposite_pictures_and_a_seed_that_is_none_are_told_before_anything_slow(model):
    turned = replace(model)
    object.__setattr__(turned, "image_embedding", lambda data: torch.ones(1, 32) * (1 if data is FIRST else -1))
    events = interpolate(turned, (FIRST, SECOND), asking(), frames=2)
    with pytest.raises(LdmError, match="embeddings of the two pictures: there is no one arc between opposite vectors"):
        next(events)
    events = interpolate(model, (FIRST, SECOND), asking(), frames=2, rows=(None, 9_999_999_999_999_999_999))
    with pytest.raises(LdmError, match="seed: found 9999999999999999999"):
        next(events)

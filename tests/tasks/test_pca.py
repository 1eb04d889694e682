"""Pictures from the first principal components of what CLIP sees in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.models.presets import small_decoder, tiny
from ldm.pipeline.clip.components import components_of
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture
from ldm.tasks.frames import GIVES_BACK
from ldm.tasks.pca import kept, pca


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(small_decoder()))


def picture(seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return picture_bytes(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))


PICTURES = [picture(seed) for seed in range(5)]


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**(GIVES_BACK | {"prompt": "", "steps": 2, "seed": 5} | fields))


def drawn(model: LatentDiffusion, pictures: list[bytes], counts: Any, **options: Any) -> list[Picture]:
    request = options.pop("request", asking())
    return [e for e in pca(model, pictures, request, counts, **options) if isinstance(e, Picture)]


def same(a: Picture, b: Picture) -> bool:
    return np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_all_components_draw_what_the_whole_embedding_draws(model):
    """Five vectors have four components, which is all of each of them: up to rounding the same picture."""
    rows = drawn(model, PICTURES, (1, 4, None))
    for one, four, whole in (rows[at : at + 3] for at in range(0, 15, 3)):
        apart = np.abs(np.asarray(four.image, np.int16) - np.asarray(whole.image))
        assert apart.max() <= 1
        assert np.abs(np.asarray(one.image, np.int16) - np.asarray(whole.image)).max() > 1
    assert [one.index for one in rows] == list(range(15)) and {one.seed for one in rows} == {5}


def test_the_errors_of_what_is_told_fall(model):
    with torch.inference_mode():
        embeddings = torch.cat([model.image_embedding(one) for one in PICTURES])
    components = components_of(embeddings)
    errors = [float((kept(embeddings[:1], count, components) - embeddings[:1]).norm()) for count in range(1, 5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    for count in (0, 2, None):
        told = kept(embeddings[:1], count, components)
        torch.testing.assert_close(told.norm(), embeddings[:1].norm())


def test_no_components_leave_the_mean(model):
    (first, second) = drawn(model, PICTURES[:2], (0,))
    assert same(first, second)


def test_inverted_it_begins_in_each_pictures_own_noise(model):
    first, second = drawn(model, PICTURES[:2], (None,), inverted=True)
    for data, one in zip(PICTURES, (first, second), strict=False):
        (back,) = model.generate(asking(vary=data, vary_inverted=True))
        assert same(one, back)


def test_components_of_other_pictures(model):
    with torch.inference_mode():
        others = components_of(torch.cat([model.image_embedding(picture(seed)) for seed in range(10, 16)]))
    (alone,) = drawn(model, PICTURES[:1], (5,), components=others)
    (own,) = model.pca([PICTURES[0]], [5], components=others, steps=2, seed=5)
    assert same(alone, own)


def test_another_sampler_where_nothing_is_inverted(model):
    assert len(drawn(model, PICTURES[:2], (1,), request=asking(sampler="euler"))) == 2


def of_width(width: int) -> Any:
    return components_of(torch.randn(4, width, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("pictures", "counts", "options", "message"),
    [
        (PICTURES[:1], (1,), {}, "components: found 1 picture, expected two or more"),
        ([], (1,), {}, "pictures: found none"),
        (PICTURES, (), {}, "components: found no number of them, expected some from 0 to 4"),
        (PICTURES, (1, 5), {}, "components: found 5, expected 0 to 4"),
        (PICTURES, (-1,), {}, "components: found -1, expected 0 to 4"),
        (PICTURES, (1,), {"components": of_width(9)}, "components: found some of 9 numbers, expected 32"),
        ([PICTURES[0]] * 3, (1,), {}, "all the same to CLIP"),
        (PICTURES, (1,), {"inverted": True, "request": asking(sampler="euler")}, "expected ddim"),
    ],
)
def test_what_cannot_be(pictures, counts, options, message, model):
    with pytest.raises(LdmError, match=message):
        drawn(model, pictures, counts, **options)

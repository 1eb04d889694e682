"""Text diffs: the start is the picture, and each frame is told a point on the arc towards the captions' difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import sd2_unclip, small_decoder, tiny
from ldm.pipeline.images import picture_bytes
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture
from ldm.tasks.frames import GIVES_BACK
from ldm.tasks.textdiff import own_text_vectors, text_direction, textdiff
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(small_decoder()))


PICTURE = picture_bytes(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64))
)


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**(GIVES_BACK | {"prompt": "", "steps": 2, "seed": 5} | fields))


def axes(texts: Sequence[str]) -> Tensor:
    """A vector along an axis of its own for each first letter."""
    return torch.stack([F.one_hot(torch.tensor(ord(text[0]) % 32), 32).float() for text in texts])


def drawn(model: LatentDiffusion, request: GenerateRequest, *captions: str, **options: Any) -> list[Picture]:
    options = {"frames": 3, "text_vectors": axes} | options
    return [e for e in textdiff(model, PICTURE, request, *captions, **options) if isinstance(e, Picture)]


def test_it_begins_with_the_picture_given_back_and_leaves_it(model):
    frames = drawn(model, asking(), "a cat", "lion")
    (back,) = model.generate(asking(vary=PICTURE, vary_inverted=True))
    first, *others = (np.asarray(frame.image) for frame in frames)
    assert np.array_equal(first, np.asarray(back.image))
    assert all(not np.array_equal(first, other) for other in others)


def test_what_is_told_turns_evenly_towards_the_difference(model):
    told: list[Tensor] = []

    def watching(cond: Conditioning, embedding: Tensor, **_: Any) -> Conditioning:
        told.append(embedding)
        return model.tell_image(cond, embedding)

    watched = replace(model)
    object.__setattr__(watched, "tell_image", watching)
    drawn(watched, asking(steps=1), "a cat", "lion", frames=5, theta=0.4)
    _, *told = told  # the first is inversion's
    z = model.image_embedding(PICTURE)
    difference = (axes(["lion"]) - axes(["a cat"])) / math.sqrt(2)
    whole = float(F.cosine_similarity(z, difference).acos())
    assert torch.equal(told[0], z)
    for vector, theta in zip(told, (0, 0.1, 0.2, 0.3, 0.4), strict=True):
        torch.testing.assert_close(vector.norm(), z.norm())
        assert float(F.cosine_similarity(z, vector).clamp(-1, 1).acos()) == pytest.approx(theta * whole, abs=2e-3)
        assert float(F.cosine_similarity(difference, vector).acos()) == pytest.approx((1 - theta) * whole, abs=2e-3)


def test_theta_1_forgets_the_picture(model):
    told: list[Tensor] = []
    watched = replace(model)
    object.__setattr__(watched, "tell_image", lambda cond, embedding, **_: (told.append(embedding), cond)[1])
    drawn(watched, asking(steps=1), "a cat", "lion", frames=2, theta=1.0)
    difference = (axes(["lion"]) - axes(["a cat"])) / math.sqrt(2)
    torch.testing.assert_close(told[-1], difference * told[0].norm())


@pytest.mark.parametrize("preset", [small_decoder, sd2_unclip])
def test_the_models_own_text_tower_speaks(preset):
    """Unit vectors of the joint space, in our decoder as in SD 2.1 unCLIP-h, whose text tower is the same CLIP's."""
    model = random_system(tiny(preset()))
    vectors = own_text_vectors(model)(["a cat", "a much longer caption"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    direction = text_direction(own_text_vectors(model), "a cat", "a lion")
    assert direction.shape == (1, 32) and float(direction.norm()) == pytest.approx(1)
    assert len(model.textdiff(PICTURE, "a cat", "a lion", frames=2, steps=1)) == 2


def test_a_model_without_such_a_tower(model):
    towerless = replace(model, text=random_system(tiny(sd2_unclip(), 64)).text)
    with pytest.raises(LdmError, match="has no text tower in the space of its image embeddings"):
        own_text_vectors(towerless)


@pytest.mark.parametrize("theta", [0.0, -0.1, 1.01, math.nan])
def test_a_theta_out_of_range(theta, model):
    with pytest.raises(LdmError, match=r"theta: found .* expected above 0 and at most 1"):
        drawn(model, asking(), "a cat", "lion", theta=theta)


def test_captions_that_say_the_same(model):
    with pytest.raises(LdmError, match='captions: found "a cat" and "an ant", which say the same'):
        drawn(model, asking(), "a cat", "an ant")
    with pytest.raises(LdmError, match="which say the same"):
        drawn(model, asking(), "a cat", "a cat", text_vectors=None)


def test_too_few_frames(model):
    with pytest.raises(LdmError, match="frames: found 1, expected 2 or more"):
        drawn(model, asking(), "a cat", "lion", frames=1)


def test_a_change_away_from_the_picture_itself(model):
    embedding = model.image_embedding(PICTURE)

    def vectors(texts: Sequence[str]) -> Tensor:
        return torch.stack([embedding[0] if text == "source" else torch.zeros(32) for text in texts])

    with pytest.raises(LdmError, match="picture and change of caption: there is no one arc between opposite vectors"):
        drawn(model, asking(), "source", "target", text_vectors=vectors)

"""A prompt drawn told nothing more, told its own vector, and told a prior's embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.models.presets import small_decoder, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture
from ldm.tasks.frames import Frame, draw_frames, sequence_request
from ldm.tasks.side_by_side import side_by_side


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(small_decoder()))


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**({"prompt": "", "steps": 2, "seed": 5, "sampler": "euler"} | fields))


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))


PROMPTS = ["a pear", "a plum"]


def drawn(model: LatentDiffusion, *arguments: Any) -> list[Picture]:
    return [event for event in side_by_side(model, *arguments) if isinstance(event, Picture)]


def test_three_for_each_prompt_from_one_noise(model):
    texts, priors = vectors(0), vectors(1)
    pictures = drawn(model, PROMPTS, asking(), texts, priors)
    assert [(one.request.prompt, one.seed) for one in pictures] == [("a pear", 5)] * 3 + [("a plum", 6)] * 3
    (plain,) = model.generate(asking(prompt="a plum", seed=6))
    assert np.array_equal(np.asarray(pictures[3].image), np.asarray(plain.image))
    request = sequence_request(model, asking(prompt="a plum", seed=6), None, inverts=False)
    for place, embedding in ((4, texts[1:]), (5, priors[1:])):
        (told,) = (e for e in draw_frames(model, [Frame(request, embedding)]) if isinstance(e, Picture))
        assert np.array_equal(np.asarray(pictures[place].image), np.asarray(told.image))
        assert not np.array_equal(np.asarray(told.image), np.asarray(plain.image))


def test_the_same_embedding_draws_the_same(model):
    texts = vectors(0)
    _, second, third, *_ = drawn(model, PROMPTS, asking(), texts, texts)
    assert np.array_equal(np.asarray(second.image), np.asarray(third.image))


@pytest.mark.parametrize("rows", [(1, 2), (2, 1)])
def test_a_row_is_missing(rows, model):
    with pytest.raises(LdmError, match="expected one of each for every prompt"):
        drawn(model, PROMPTS, asking(), vectors(0)[: rows[0]], vectors(1)[: rows[1]])


def test_an_embedding_of_another_width(model):
    with pytest.raises(LdmError, match="embedding: found"):
        drawn(model, PROMPTS, asking(), vectors(0)[:, :9], vectors(1))

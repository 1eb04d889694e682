"""A prompt drawn told nothing more, told its own vector, and told what a prior makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.errors import LdmError
from ldm.models.presets import small_decoder, tiny
from ldm.models.prior import Prior, PriorConfig
from ldm.models.tokenizer import tokenize
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import GenerateRequest, PriorUse
from ldm.pipeline.sample import Picture
from ldm.tasks.frames import Frame, draw_frames, sequence_request
from ldm.tasks.side_by_side import side_by_side

PROMPTS = ["a pear", "a (plum:1.3)"]
USE = PriorUse(steps=2)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    decoder = random_system(tiny(small_decoder()))
    torch.manual_seed(1)
    return decoder.with_prior(Prior(PriorConfig(projection=32, text_width=32, width=32, layers=1, heads=2)).eval())


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**({"prompt": "", "steps": 2, "seed": 5, "sampler": "euler", "prior": USE} | fields))


def drawn(model: LatentDiffusion, prompts: list[str], request: GenerateRequest) -> list[Picture]:
    return [event for event in side_by_side(model, prompts, request) if isinstance(event, Picture)]


def same(one: Picture, other: Picture) -> bool:
    return np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_three_for_each_prompt_from_one_noise(model):
    pictures = drawn(model, PROMPTS, asking())
    assert [(one.request.prompt, one.seed) for one in pictures] == [("a pear", 5)] * 3 + [("a (plum:1.3)", 6)] * 3
    alone, vector, imagined = pictures[3:]
    assert not same(alone, vector) and not same(alone, imagined) and not same(vector, imagined)
    plain = asking(prompt="a (plum:1.3)", seed=6, prior=None)
    assert same(alone, model.generate(plain)[0])
    assert same(imagined, model.generate(plain, prior=USE)[0]), "the prior's is what the request with a prior draws"
    with torch.inference_mode():
        said = model.text[0](torch.tensor([tokenize("a plum")]), pooled=True).pooled
    frame = Frame(sequence_request(model, plain, None, inverts=False), F.normalize(said, dim=-1) * 32**0.5)
    (told,) = (event for event in draw_frames(model, [frame]) if isinstance(event, Picture))
    levels = np.abs(np.asarray(vector.image, dtype=int) - np.asarray(told.image, dtype=int))
    assert levels.max() <= 2, "but for rounding, since the padding was left out"


def test_what_is_refused(model):
    with pytest.raises(LdmError, match="prior: found none, expected one to compare with; give it by --prior"):
        drawn(replace(model, prior=None), PROMPTS, asking())
    with pytest.raises(LdmError, match="prompts: found none, expected some to draw"):
        drawn(model, [], asking())
    with pytest.raises(LdmError, match="count: found 2, expected 1"):
        drawn(model, PROMPTS, asking(count=2))

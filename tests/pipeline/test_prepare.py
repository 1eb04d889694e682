"""From a request to what the loop runs: what the U-Net is told at which step, seeds, and what is filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.diffusion.guidance import Told
from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.adapters import AppliedAdapter
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.prepare import resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Stage, guidance_of
from ldm.tasks import run


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def told(model: LatentDiffusion, prompt: str, **fields: Any) -> tuple[list[tuple[float, Told]], torch.Tensor]:
    options: dict[str, Any] = {"steps": 4, "seed": 0} | fields
    request = resolve(model, GenerateRequest(prompt=prompt, **options))
    sigmas = sigmas_for(model, request)
    return told_over(model, request, sigmas), sigmas


def now(spans: list[tuple[float, Told]], sigma: float) -> Told:
    return next(one for start, one in reversed(spans) if sigma <= start)


def says(model: LatentDiffusion, one: Told, text: str, part: int = 0) -> bool:
    cross, wanted = one.parts[part][0].cross, model.encode_prompt(text).cross
    return cross is not None and wanted is not None and torch.equal(cross, wanted)


def test_a_plain_prompt_holds_at_all_steps(model):
    spans, _ = told(model, "a cat")
    assert len(spans) == 1 and spans[0][0] == torch.inf
    assert spans[0][1].ordinary and spans[0][1].uncond is not None and says(model, spans[0][1], "a cat")


def test_a_prompt_that_changes_holds_from_its_step_on(model):
    spans, sigmas = told(model, "a [cat:dog:2]")
    shown = ["a cat" if says(model, now(spans, float(sigma)), "a cat") else "a dog" for sigma in sigmas[:-1]]
    assert shown == ["a cat", "a cat", "a dog", "a dog"]
    assert says(model, now(spans, float(sigmas[2])), "a dog")
    between = float(sigmas[1] * sigmas[2]) ** 0.5  # what a solver asks within the step before
    assert says(model, now(spans, between), "a cat")


def test_the_negative_prompt_changes_too(model):
    spans, sigmas = told(model, "a cat", negative="[red|blue]")
    crosses = [now(spans, float(sigma)).uncond for sigma in sigmas[:-1]]
    wanted = [model.encode_prompt(text).cross for text in ("red", "blue", "red", "blue")]
    for got, want in zip(crosses, wanted, strict=True):
        assert got is not None and got.cross is not None and want is not None and torch.equal(got.cross, want)


def test_parts_keep_their_weights_and_have_something_to_be_weighed_against(model):
    spans, _ = told(model, "a cat :0.7 AND a dog", guidance=1.0)
    (_, one), (_, weight) = spans[0][1].parts[0], spans[0][1].parts[1]
    assert (one, weight) == (0.7, 1.0) and spans[0][1].uncond is not None
    assert says(model, spans[0][1], "a dog", part=1)
    assert told(model, "a cat", guidance=1.0)[0][0][1].uncond is None


@pytest.mark.parametrize("emphasis", ["comfy", "compel", "literal"])
def test_other_programs_rules_have_no_changes_and_no_parts(model, emphasis):
    spans, _ = told(model, "a [cat|dog] AND a bird", emphasis=emphasis)
    assert len(spans) == 1 and len(spans[0][1].parts) == 1


def test_an_adapter_that_the_model_lacks_is_named(model):
    with pytest.raises(LdmError, match=r"^prompt: names the adapter 'ink', .* \(none\); give it by --lora"):
        told(model, "a cat <lora:ink:0.5>")
    having = replace(model, adapters=(AppliedAdapter("ink", "0" * 12, 0.5, 0.5),))
    assert says(model, told(having, "a cat <lora:ink:0.5>")[0][0][1], "a cat")


def test_guidance_between_shares_of_the_steps(model):
    request = resolve(model, GenerateRequest(prompt="x", steps=4, seed=0, guidance_start=0.25, guidance_end=0.75))
    sigmas = sigmas_for(model, request)
    interval = guidance_of(Stage(model, request, (), sigmas, lambda noise, _: noise.start)).interval
    assert interval is not None
    assert [interval[0] <= sigma <= interval[1] for sigma in sigmas.tolist()] == [False, True, True, False, False]
    never = request.changed(guidance_start=0.3, guidance_end=0.4)
    interval = guidance_of(Stage(model, never, (), sigmas, lambda noise, _: noise.start)).interval
    assert interval is not None and not any(interval[0] <= sigma <= interval[1] for sigma in sigmas.tolist())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rng": "philox"},
        {"rng": "comfy", "batch_index": 2},
        {"variation_strength": 0.3, "variation_seed": 7},
        {"sampler": "dpmpp-2m-sde"},
        {"sampler": "dpmpp-2m-sde", "rng": "comfy"},
        {"sampler": "euler-a", "rng": "philox"},
    ],
    ids=str,
)
def test_each_picture_of_a_batch_is_the_one_of_its_own_request(model, fields):
    """Which is what `ldm redo` runs: the request that a picture carries."""

    def pixels(request: GenerateRequest) -> list[tuple[Picture, np.ndarray]]:
        drawn = (event for event in run(model, request) if isinstance(event, Picture))
        return [(picture, np.asarray(picture.image).astype(int)) for picture in drawn]

    together = pixels(GenerateRequest(prompt="a cat", steps=3, seed=5, count=3, **fields))
    assert len({image.tobytes() for _, image in together}) == 3
    for picture, image in together:
        ((_, alone),) = pixels(picture.request)
        assert abs(alone - image).max() <= 1


def test_a_seed_is_drawn_once_for_a_variation(model):
    request = resolve(model, GenerateRequest(prompt="x", variation_strength=0.5))
    assert request.seed is not None and request.variation_seed is not None and request.variation_seed >= 0
    assert resolve(model, GenerateRequest(prompt="x")).variation_seed is None


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_few_steps_begin_in_noise(sampler, model):
    """DDIM's own levels begin at timestep 1 of 1000 with one step; what is drawn from noise there is noise."""
    for steps, schedule in ((1, "trailing"), (2, "trailing"), (3, "leading")):
        request = resolve(model, GenerateRequest(prompt="x", sampler=sampler, steps=steps))
        assert request.schedule == schedule and sigmas_for(model, request)[0] > 2
    chosen = GenerateRequest(prompt="x", sampler=sampler, steps=1, schedule="leading")
    assert resolve(model, chosen).schedule == "leading"

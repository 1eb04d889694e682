"""The second pass equals diffusers' two pipelines, one after the other, with an enlargement between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from theirs import WatchedControl, asked, assert_equal, final_latents, networks
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import sd1, sdxl, tiny
from ldm.pipeline.images import picture_bytes, to_image, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.request import Control, GenerateRequest, HighRes
from ldm.pipeline.sample import Progress
from ldm.tasks import run
from ldm.types import Conditioning


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def asking(**fields: Any) -> GenerateRequest:
    given = {"prompt": "a red apple", "width": 64, "height": 96, "steps": 5, "seed": 5, "sampler": "ddim"}
    return GenerateRequest(**given | fields)


def enlarged(model: LatentDiffusion, latents: Tensor, upscale: str, width: int, height: int) -> Tensor:
    if upscale == "latent":
        return F.interpolate(latents, (height // 8, width // 8), mode="bilinear", align_corners=False, antialias=False)
    pictures = [to_image(pixels) for pixels in model.autoencoder.decode(latents)]
    larger = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    return model.autoencoder.encode(torch.stack([to_tensor(picture) for picture in larger]))


@pytest.mark.parametrize(("upscale", "steps"), [("latent", None), ("lanczos", 4)])
def test_it_equals_diffusers(upscale, steps, model):
    highres = HighRes(scale=1.5, upscale=upscale, strength=0.5, steps=steps)
    request = asking(negative="blurry", guidance=4.0, count=2, highres=highres)
    first = diffusers.StableDiffusionPipeline(
        **networks(model), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    second = diffusers.StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    given = asked(model, request, count=2)
    latents = first(**given, width=64, height=96, generator=generators()).images
    latents = enlarged(model, latents, upscale, 96, 144)
    given["num_inference_steps"] = steps or 5
    theirs = second(**given, image=latents, strength=0.5, generator=generators()).images
    assert_equal(final_latents(model, request), theirs)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def test_the_picture_is_larger_and_the_request_is_not(model):
    (drawn,) = model.generate(asking(highres=HighRes(scale=1.3)))
    assert drawn.image.size == (80, 128)  # 83.2 and 124.8, in multiples of 8
    assert (drawn.request.width, drawn.request.height) == (64, 96)
    again = model.generate(drawn.request)[0]
    assert np.array_equal(np.asarray(again.image), np.asarray(drawn.image))


def test_steps_are_counted_over_both_passes(model):
    events = [e for e in run(model, asking(highres=HighRes(strength=0.5, steps=5))) if isinstance(e, Progress)]
    assert [event.done for event in events] == list(range(8)) and {event.steps for event in events} == {7}


@pytest.mark.parametrize("upscale", ["latent", "lanczos"])
def test_a_picture_of_a_batch_equals_its_seed_alone(upscale, model):
    fields = {"highres": HighRes(scale=1.5, upscale=upscale), "sampler": "euler-a"}
    batch, alone = final_latents(model, asking(count=2, **fields)), final_latents(model, asking(seed=6, **fields))
    torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_the_prompt_is_told_anew():
    """SDXL hears the larger size, and what a prompt says from half of its steps on, it says so in each pass."""
    model = random_system(tiny(sdxl()))
    told: list[Conditioning] = []

    def watching(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        told.append(cond)
        return model.unet(x, timestep, cond)

    watched = replace(model, unet=watching)  # pyright: ignore[reportArgumentType]
    fields = {"guidance": 1.0, "sampler": "euler", "steps": 4, "highres": HighRes(scale=2, strength=1.0)}
    watched.generate(asking(prompt="[pear:apple:0.5]", **fields))
    expected = [
        model.encode_prompt(word, width=width, height=height)
        for width, height in ((64, 96), (128, 192))
        for word in ("pear", "pear", "apple", "apple")
    ]
    assert len(told) == 8
    for ours, theirs in zip(told, expected, strict=True):
        assert ours.vector is not None and theirs.vector is not None and ours.cross is not None
        torch.testing.assert_close(ours.vector, theirs.vector)
        torch.testing.assert_close(ours.cross, theirs.cross)


def test_controls_see_their_picture_at_both_sizes(model):
    watched = WatchedControl(model)
    controls = [Control(network="a", image=picture_bytes(Image.new("RGB", (30, 45), "red")))]
    request = asking(guidance=1.0, steps=2, sampler="euler", controls=controls, highres=HighRes(strength=1.0))
    replace(model, controls={"a": watched}).generate(request)  # pyright: ignore[reportArgumentType]
    assert watched.seen == [((12, 8), (96, 64))] * 2 + [((24, 16), (192, 128))] * 2


def test_what_is_refused(model):
    with pytest.raises(
        LdmError, match=r"highres.scale: 1.01 times 64x96 is 64x96 in multiples of 8, expected a larger"
    ):
        model.generate(asking(highres=HighRes(scale=1.01)))
    with pytest.raises(LdmError, match=r"highres.scale: 4 times 2048x1536 is 8192x6144, expected at most"):
        model.generate(asking(width=2048, height=1536, highres=HighRes(scale=4)))

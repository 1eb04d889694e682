"""Inpainting equals diffusers' pipeline on the same weights, mask and noise, to 1e-3, with both kinds of model.

With an ordinary model theirs puts the noised picture back after every step, ours holds the denoiser to it: for solvers
that draw no noise of their own the two are the same.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from test_pipeline_parity import (
    DDIM,
    LEADING,
    NEGATIVE,
    PROMPT,
    SEEDS,
    STEPS,
    TOLERANCE,
    their_arguments,
    their_pipeline,
    tokenizers,  # noqa: F401, a fixture
)
from torch import Tensor

from ldm.diffusion.state import finish_state
from ldm.models.presets import sd1, tiny
from ldm.pipeline.images import picture_bytes, to_image, to_tensor
from ldm.pipeline.load import random_system
from ldm.pipeline.picture import Picture
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.tasks import run

SCHEDULERS: dict[str, Any] = {
    "euler": lambda: diffusers.EulerDiscreteScheduler(**LEADING),
    "ddim": lambda: diffusers.DDIMScheduler(**LEADING | DDIM),
}
WIDTH, HEIGHT = 128, 96
HOLE = slice(24, 72), slice(40, 128)  # rows and columns, whole latent cells


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize(
    ("channels", "strength", "fill"), [(4, 0.6, "original"), (9, 0.6, "original"), (9, 1.0, "noise")]
)
def test_inpainting(channels, strength, fill, solver, tokenizers):  # noqa: F811
    model = random_system(tiny(sd1(in_channels=channels)), seed=channels)
    pipeline = their_pipeline(model, tokenizers, SCHEDULERS[solver]())
    theirs = diffusers.StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    picture = to_image(torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9)) * 2 - 1)
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[0, 0][HOLE] = 1
    request = GenerateRequest(
        prompt=PROMPT, negative=NEGATIVE, width=WIDTH, height=HEIGHT, steps=STEPS, sampler=solver, schedule="leading",
        guidance=4.0, seed=SEEDS[0], count=len(SEEDS), image=picture_bytes(picture), strength=strength,
        mask=picture_bytes(to_image(mask[0].expand(3, -1, -1) * 2 - 1)), mask_fill=fill, mask_blur=0,
    )  # fmt: skip

    def mean_latent(pixels: Tensor) -> Tensor:
        return theirs.vae.encode(pixels).latent_dist.mode() * theirs.vae.config.scaling_factor

    pixels = to_tensor(picture)[None]
    with torch.no_grad():
        given = their_arguments(request) | {
            "image": torch.cat([mean_latent(pixels)] * len(SEEDS)),
            "mask_image": mask,
            "masked_image_latents": mean_latent(pixels * (mask < 0.5)),
            "strength": strength,
        }
        their_latents = theirs(**given).images

    events = list(run(model, request))
    last = [event.step for event in events if isinstance(event, Progress)][-1]
    assert last is not None
    ours = finish_state(last.x, last.sigma_next)
    scale = float(their_latents.abs().max())
    assert scale > 0.1
    cells = torch.ones(HEIGHT // 8, WIDTH // 8, dtype=torch.bool)
    if channels == 4 and solver == "ddim":  # theirs takes the last noise off around the hole, ours nowhere
        cells = mask[0, 0, ::8, ::8] > 0
    assert torch.allclose(ours[..., cells], their_latents[..., cells], rtol=TOLERANCE, atol=TOLERANCE * scale)
    decoded = model.autoencoder.decode(their_latents)
    for image, expected in zip((e.image for e in events if isinstance(e, Picture)), decoded, strict=True):
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(to_image(expected), dtype=int))
        within = difference[HOLE][16:-16, 16:]  # what the decoder makes of it, away from the edge
        assert within.max() <= 1

"""Text to image: from pure noise over all steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.diffusion.state import start_state
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import conditions, resolve, sigmas_for
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, run


@torch.inference_mode()
def txt2img(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw `request.count` pictures of the prompt. Raises `LdmError` as `ldm.pipeline.sample.run` does."""
    request = resolve(model, request)
    cond, uncond, notes = conditions(model, request)
    sigmas = sigmas_for(model, request)
    start = float(sigmas[0])
    yield from run(model, Job(request, cond, uncond, sigmas, lambda noise: start_state(noise.start, start), notes))

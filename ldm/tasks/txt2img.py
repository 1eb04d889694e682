"""Text to image: from pure noise over all steps, and where it is wanted a second pass and a refiner."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.diffusion.state import start_state
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import Show, as_trained, resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, Stage, run
from ldm.tasks.highres import second_pass
from ldm.tasks.refine import handed_over


@torch.inference_mode()
def txt2img(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw `request.count` pictures of the prompt. Raises `LdmError` as `ldm.pipeline.sample.run` does."""
    yield from run(model, txt2img_job(model, request))


def txt2img_job(model: LatentDiffusion, request: GenerateRequest, show: Show = as_trained) -> Job:
    """What is to be run, in inference mode. show: what the U-Net is shown beside the latent.

    With a second pass as well as a refiner, the refiner finishes the second pass.
    """
    request = resolve(model, request)
    tell, notes = show(model, request)
    sigmas = sigmas_for(model, request)
    start = float(sigmas[0])
    told = told_over(model, request, sigmas, tell)
    first = Stage(model, request, told, sigmas, lambda noise, _: start_state(noise.start, start))
    if request.highres is None:
        return Job(request, handed_over(first), notes=notes)
    return Job(request, [first, *handed_over(second_pass(first, show))], notes=notes)

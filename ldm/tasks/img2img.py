"""Image to image: a picture is noised up to some level and denoised again, towards the prompt (Meng et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.diffusion.state import noised
from ldm.errors import LdmError
from ldm.pipeline.images import fit, read_picture
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import Show, as_trained, last_steps, resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, Stage, run
from ldm.tasks.refine import handed_over


@torch.inference_mode()
def img2img(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Redraw `request.image`: the last `request.steps_to_run` of the steps, from its latent's mean plus noise.

    The picture is scaled and cut to the request's size, or to its own shape at the model's size. Raises `LdmError`
    where there is no picture, and as `ldm.pipeline.sample.run` does.
    """
    yield from run(model, img2img_job(model, request))


def img2img_job(model: LatentDiffusion, request: GenerateRequest, show: Show = as_trained) -> Job:
    """What is to be run, in inference mode. show: what the U-Net is shown beside the latent."""
    if request.image is None:
        raise LdmError("image: found none, expected a picture to start from; give image")
    request = resolve(model, request)
    assert request.image is not None and request.width is not None and request.height is not None
    tell, notes = show(model, request)
    latent = model.latent_of(fit(read_picture(request.image), request.width, request.height))
    sigmas = last_steps(sigmas_for(model, request), request.steps_to_run)
    start = float(sigmas[0])
    told = told_over(model, request, sigmas, tell)
    stage = Stage(model, request, told, sigmas, lambda noise, _: noised(latent, noise.start, start))
    return Job(request, handed_over(stage), notes=notes)

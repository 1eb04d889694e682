"""Image to image: a picture is noised up to some level and denoised again, towards the prompt (Meng et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.diffusion.state import noised
from ldm.errors import LdmError
from ldm.pipeline.images import fit, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import conditions, resolve, sigmas_for
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, run


@torch.inference_mode()
def img2img(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Redraw `request.image`: the last `request.steps_to_run` of the steps, from its latent's mean plus noise.

    The picture is scaled and cut to the request's size, or to its own shape at the model's size. Raises `LdmError`
    where there is no picture, and as `ldm.pipeline.sample.run` does.
    """
    if request.image is None:
        raise LdmError("image: found none, expected a picture to start from; give image")
    request = resolve(model, request)
    assert request.image is not None and request.width is not None and request.height is not None
    cond, uncond, notes = conditions(model, request)
    picture = to_tensor(fit(read_picture(request.image), request.width, request.height))
    weights = next(model.autoencoder.parameters())
    latent = model.autoencoder.encode(picture[None].to(weights)).float()
    if not torch.isfinite(latent).all():
        raise LdmError("autoencoder: the picture's latent is not finite; the file is damaged, or try --dtype float32")
    sigmas = sigmas_for(model, request)
    start = float(sigmas[0])
    yield from run(model, Job(request, cond, uncond, sigmas, lambda noise: noised(latent, noise.start, start), notes))

"""Variations of a picture, by a model that is told what CLIP sees in it: Stable Diffusion 2.1 unCLIP, or our decoder.

Ramesh et al. 2022. The embedding is noised, so that what is drawn keeps less of the picture the higher the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.common import ToldOver, one_by_one, other_seed, refuse, seeing
from ldm.tasks.img2img import img2img_job
from ldm.tasks.txt2img import txt2img_job


@torch.inference_mode()
def variations(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw pictures like `request.vary`, from noise or from `request.image`; the prompt may be empty.

    The embedding is noised from each picture's own seed, so that each is drawn alone; the negative side is told zeros.
    Raises `LdmError` where the model takes no picture, and as `ldm.pipeline.sample.run` does.
    """
    if request.vary is None:
        raise LdmError("vary: found none, expected a picture to vary; give vary, as `ldm variations` does")
    refuse(request, ("mask", "extend", "depth"), "vary")
    embedding, level = model.image_embedding(request.vary), request.vary_noise

    def tell(told: ToldOver, one: GenerateRequest) -> ToldOver:
        see = partial(model.tell_image, embedding=embedding, noise_level=level, seed=other_seed(one))
        return [(sigma, seeing(now, see)) for sigma, now in told]

    job = (txt2img_job if request.image is None else img2img_job)(model, request)
    yield from one_by_one(model, job, tell)

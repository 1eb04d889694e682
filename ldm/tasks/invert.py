"""Inversion: a picture as a pair (z, x_T) that DDIM gives it back from (Ramesh et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, always, guided
from ldm.diffusion.state import finish_state, start_state
from ldm.errors import LdmError
from ldm.pipeline.images import fit, read_picture
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import sigmas_for
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Progress
from ldm.samplers.inversion import ddim_inversion
from ldm.tasks.frames import sequence_request

REFINEMENTS = 1
"""How often each step up is refined, see `ddim_inversion`."""


@dataclass(frozen=True, eq=False)
class Inverted:
    """A picture as a decoder's two inputs.

    request:   resolved; decoded at its size and steps, without guidance and eta, they give the picture back
    embedding: (1, P) z, what CLIP sees in the picture
    noise:     (1, z, h, w) float32 x_T, of about unit variance: all that CLIP does not see
    """

    request: GenerateRequest
    embedding: Tensor
    noise: Tensor


def invert(model: LatentDiffusion, picture: bytes, request: GenerateRequest) -> Inverted:
    """A picture file's bytes -> the pair; see `inverting`."""
    steps = inverting(model, picture, request)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@torch.inference_mode()
def inverting(
    model: LatentDiffusion, picture: bytes, request: GenerateRequest, *, refinements: int = REFINEMENTS
) -> Generator[Progress, None, Inverted]:
    """Invert a picture, scaled and cut to the request's size, or to its own shape at the model's size.

    The model is told the picture's embedding and no text, without guidance, whatever the request says it is to be
    decoded with. Each step is yielded as progress of a picture of which nothing is drawn yet. Raises `LdmError` for a
    sampler other than ddim, for a model that takes no picture, and for a step that is not finite.
    """
    request = sequence_request(model, request, picture, inverts=True)
    assert request.width is not None and request.height is not None
    embedding = model.image_embedding(picture)
    latent = model.latent_of(fit(read_picture(picture), request.width, request.height))
    nothing = model.encode_prompt("", width=request.width, height=request.height, clip_skip=request.clip_skip)
    cond = model.tell_image(nothing, embedding)
    denoise = guided(model.denoiser(), always(cond), Guidance(1.0))
    sigmas = sigmas_for(model, request)
    x, rising = start_state(latent, float(sigmas[-1])), sigmas[sigmas > 0].flip(0)
    for step in ddim_inversion(denoise, x, rising, refinements=refinements):
        if not torch.isfinite(step.x).all():
            raise LdmError(
                f"inversion: step {step.index + 1} of {len(rising) - 1} (sigma {step.sigma:.4g}) gave values that are"
                " not finite; the file is damaged, or try --dtype float32"
            )
        x = step.x
        yield Progress(0, 1, 0, len(sigmas) - 1, step)
    return Inverted(request, embedding, finish_state(x, float(rising[-1])))

"""From a request to what the loop needs: what was left to a default, the noise levels, the conditioning."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from ldm.diffusion.sigmas import SCHEDULES, end_above_zero
from ldm.errors import LdmError
from ldm.pipeline.images import read_picture, shape_like
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import DEFAULT_STRENGTH, GenerateRequest
from ldm.samplers import SAMPLERS
from ldm.types import Conditioning


def resolve(model: LatentDiffusion, request: GenerateRequest) -> GenerateRequest:
    """The request with its size, schedule, seed and, where there is a picture to start from, strength filled in."""
    width = height = model.config.size
    strength = request.strength
    picture = request.image or next((control.image for control in request.controls), None)
    if picture is not None:
        width, height = shape_like(read_picture(picture).size, model.config.size)
    if request.image is not None and strength is None:
        strength = DEFAULT_STRENGTH
    suits = "trailing" if model.config.zero_terminal_snr else SAMPLERS[request.sampler].schedule
    drawn = request.seed is None or request.seed == -1
    return request.changed(
        width=request.width or width,
        height=request.height or height,
        schedule=request.schedule or suits,
        seed=secrets.randbelow(2**32) if drawn else request.seed,
        strength=strength,
    )


def sigmas_for(model: LatentDiffusion, request: GenerateRequest) -> Tensor:
    """The levels that a resolved request runs over, (n + 1,) falling; for image-to-image the last of them."""
    assert request.schedule is not None
    sigmas = SCHEDULES[request.schedule](model.schedule, request.steps)
    if SAMPLERS[request.sampler].ends_above_zero:
        sigmas = end_above_zero(sigmas, model.schedule)
    return sigmas[-(request.steps_to_run + 1) :]


def conditions(
    model: LatentDiffusion, request: GenerateRequest
) -> tuple[Conditioning, Conditioning | None, tuple[str, ...]]:
    """What a resolved request tells the U-Net: with the prompt, without it (None at guidance 1), and notes."""
    channels, notes = _extra_channels(model, request)
    width, height, clip_skip = request.width, request.height, request.clip_skip
    cond = model.encode_prompt(request.prompt, width=width, height=height, clip_skip=clip_skip)
    uncond = None
    if request.guidance != 1:
        zeros = request.empty_negative == "zeros" and not request.negative
        uncond = model.encode_prompt(
            request.negative, width=width, height=height, clip_skip=clip_skip, wanted=False, zeros=zeros
        ).with_(concat=channels)
    for name, text in (("prompt", request.prompt), ("negative", request.negative)):
        if cut := model.words_cut(text):
            notes = (*notes, f"{name}: its last {cut} tokens do not fit into the text encoder and were left out")
    if model.config.image is not None:
        notes = (*notes, "this model varies pictures; it was given none, and draws from the text alone")
    return cond.with_(concat=channels), uncond, notes


def _extra_channels(model: LatentDiffusion, request: GenerateRequest) -> tuple[Tensor | None, tuple[str, ...]]:
    """`Conditioning.concat` (1, C, h, w) for a U-Net with more channels than the latent has: a full mask.

    An inpainting U-Net is shown a mask and the latent of what is outside of it; here all is inside.
    """
    latent_channels = model.config.autoencoder.latent_channels
    extra = model.config.unet.in_channels - latent_channels
    if extra == 0:
        return None, ()
    if extra != latent_channels + 1:
        raise LdmError(
            f"{model.origin.path or 'model'}: its U-Net takes {extra} extra channels (a depth map or a small picture),"
            " expected one that draws from text; use another checkpoint"
        )
    assert request.width is not None and request.height is not None
    dtype = next(model.autoencoder.parameters()).dtype
    grey = torch.zeros(1, 3, request.height, request.width, device=model.device, dtype=dtype)
    outside = model.autoencoder.encode(grey).float()
    mask = torch.ones_like(outside[:, :1])
    return torch.cat([mask, outside], dim=1), ("this is an inpainting model: all of the picture is masked",)

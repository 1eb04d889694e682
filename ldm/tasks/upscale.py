"""The upscalers: a small picture, a little noised, stands beside the latent that becomes the same one, but large.

Rombach et al. 2022, section 4.4; Saharia et al. 2021 for the noise, which frees the U-Net from trusting every pixel.
The first stage shrinks by as much as is enlarged, 4 for Stable Diffusion's and 2 for ours, so the small picture has the
latent's size. Ours has no autoencoder: its latents are what is added to the noised picture, see
`ldm.models.pixel_blocks`. Shapes: h and w height and width of the small picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.diffusion.noise import start_noise
from ldm.diffusion.state import start_state
from ldm.errors import LdmError
from ldm.models.pixel_blocks import PixelBlocks
from ldm.pipeline.images import MAX_PIXELS, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, Stage, alone, run
from ldm.pipeline.upscaling import details_of, noised_picture
from ldm.tasks.common import ToldOver, other_seed, refuse
from ldm.types import Conditioning
from ldm.weights.io import printable

MAX_SIDE = 2048

NOT_TAKEN = ("strength", "mask", "extend", "highres", "depth", "vary", "controls", "refine_at")
"""Fields that mean nothing here."""


def is_upscaler(model: LatentDiffusion) -> bool:
    """Whether the model is told how much noise there is over a small picture, as the upscalers are."""
    return model.config.unet.classes is not None


@torch.inference_mode()
def upscale(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw `request.image` as many times as large as the model's latents are smaller than its pictures, exactly: what
    is added to reach whole latents is cut off again.

    The picture is noised from its own seed, so that each is drawn alone. Raises `LdmError` where the model is no
    upscaler, there is no picture or one that is too large, and for what an upscaler cannot be asked.
    """
    if not is_upscaler(model):
        name = printable(str(model.origin.path or "model"))
        raise LdmError(f"{name}: is no upscaler, expected the x4 upscaler of Stable Diffusion 2, or ours; use that one")
    scale = model.config.autoencoder.downsampling
    refuse(request, NOT_TAKEN, f"the x{scale} upscaler")
    if request.image is None:
        raise LdmError("image: found none, expected a picture to enlarge; give image, as `ldm upscale` does")
    _check_level(model, request.upscale_noise)
    small = read_picture(request.image)
    _check_size(small, request, scale)
    pixels = _padded(to_tensor(small)[None], 2 ** (len(model.config.unet.channel_mult) - 1)).to(model.device)
    job, stage = _job(model, request, pixels, small)
    for index in range(job.request.count):
        one = alone(job.request, index)
        drawing, seen = _seen(model, stage, pixels, one)
        for event in run(drawing, replace(job, request=one, stages=[seen])):
            yield replace(event, index=index) if isinstance(event, Picture) else replace(event, first=index)


def _job(model: LatentDiffusion, request: GenerateRequest, pixels: Tensor, small: Image.Image) -> tuple[Job, Stage]:
    """What is to be run, and its stage, not told the picture yet. pixels: (1, 3, h, w), the picture with its margin."""
    asked = request.width, request.height
    resolved = resolve(model, request).model_copy(update={"strength": None})
    notes: tuple[str, ...] = ()
    if not model.text:
        resolved = resolved.model_copy(update={"guidance": 1.0})  # there is nothing to lead away from
        notes = ("prompt: this model takes no text; it did not act",) if request.prompt else ()
    scale = model.config.autoencoder.downsampling
    height, width = (scale * side for side in pixels.shape[2:])
    here = resolved.model_copy(update={"width": width, "height": height})
    sigmas = sigmas_for(model, here)
    start = float(sigmas[0])
    stage = Stage(model, here, told_over(model, here, sigmas), sigmas, lambda noise, _: start_state(noise.start, start))
    recorded = resolved.model_copy(update=dict(zip(("width", "height"), asked, strict=True)))
    large = scale * small.width, scale * small.height
    return Job(recorded, [stage], finish=lambda image: image.crop((0, 0, *large)), notes=notes), stage


def _check_level(model: LatentDiffusion, level: int) -> None:
    classes = model.config.unet.classes
    if classes is not None and level >= classes:
        raise LdmError(f"upscale_noise: found {level}, expected 0 to {classes - 1}, the levels that this model knows")


def _check_size(small: Image.Image, request: GenerateRequest, scale: int) -> None:
    width, height = small.size
    if max(small.size) > MAX_SIDE or scale**2 * width * height > MAX_PIXELS:
        raise LdmError(
            f"image: found {width}x{height}, expected sides of at most {MAX_SIDE} and {MAX_PIXELS // scale**2} pixels"
            " in all to enlarge; cut it, or scale it down"
        )
    for name, given, side in (("width", request.width, width), ("height", request.height, height)):
        if given not in (None, scale * side):
            raise LdmError(f"{name}: found {given}, expected {scale * side}, {scale} times the picture's; leave it out")


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    """(1, 3, h, w) with sides that the U-Net can halve at each level, by repeating the right and the lower edge."""
    height, width = pixels.shape[2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _seen(
    model: LatentDiffusion, stage: Stage, pixels: Tensor, request: GenerateRequest
) -> tuple[LatentDiffusion, Stage]:
    """The model and the stage that draw one picture: told the small one (1, 3, h, w), noised, and the level."""
    levels = torch.tensor([request.upscale_noise])
    noised = noised_picture(pixels, start_noise(pixels.shape[1:], [other_seed(request)]).to(pixels), levels)
    if isinstance(model.autoencoder, PixelBlocks):
        model = replace(model, autoencoder=details_of(model.autoencoder, noised, levels))
    told = _shown(stage.told, noised, levels.to(pixels.device))
    return model, replace(stage, model=model, told=told)


def _shown(told: ToldOver, noised: Tensor, levels: Tensor) -> ToldOver:
    """`told` with the noised picture (1, 3, h, w) and its level (1,), on both sides of guidance."""

    def with_picture(cond: Conditioning) -> Conditioning:
        return cond.with_(concat=noised, vector=levels)

    def with_pictures(one: Told) -> Told:
        parts = tuple((with_picture(cond), weight) for cond, weight in one.parts)
        return Told(parts, None if one.uncond is None else with_picture(one.uncond))

    return [(sigma_from, with_pictures(one)) for sigma_from, one in told]

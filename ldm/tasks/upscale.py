"""The x4 upscaler: a small picture, a little noised, stands beside the latent that becomes the same one, but large.

Rombach et al. 2022, section 4.4; Saharia et al. 2021 for the noise, which frees the U-Net from trusting every pixel.
Its autoencoder shrinks by 4, so the small picture has the latent's size. Shapes: h and w its height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.diffusion.noise import start_noise
from ldm.diffusion.schedule import upscaler
from ldm.diffusion.state import start_state
from ldm.errors import LdmError
from ldm.pipeline.images import MAX_PIXELS, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Job, Picture, Progress, Stage
from ldm.tasks.common import ToldOver, one_by_one, other_seed, refuse
from ldm.types import Conditioning
from ldm.weights.io import printable

SCALE = 4
MAX_SIDE = 2048
LATENT_MULTIPLE = 8
"""The U-Net halves a latent three times."""

NOT_TAKEN = ("strength", "mask", "extend", "highres", "depth", "vary", "controls", "refine_at")
"""Fields that mean nothing here."""


def is_upscaler(model: LatentDiffusion) -> bool:
    """Whether the model is told how much noise there is over a small picture, as the x4 upscaler is."""
    return model.config.unet.classes is not None


@torch.inference_mode()
def upscale(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw `request.image` four times as large, exactly: what is added to reach whole latents is cut off again.

    The picture is noised from its own seed, so that each is drawn alone. Raises `LdmError` where the model is no
    upscaler, there is no picture or one that is too large, and for what an upscaler cannot be asked.
    """
    if not is_upscaler(model):
        name = printable(str(model.origin.path or "model"))
        raise LdmError(f"{name}: is no upscaler, expected the x4 upscaler of Stable Diffusion 2; use another one")
    refuse(request, NOT_TAKEN, "the x4 upscaler")
    if request.image is None:
        raise LdmError("image: found none, expected a picture to enlarge; give image, as `ldm upscale` does")
    small = read_picture(request.image)
    _check_size(small, request)
    pixels = _padded(to_tensor(small)[None])
    job = _job(model, request, pixels, small)
    yield from one_by_one(model, job, partial(_shown, pixels.to(model.device), request.upscale_noise))


def _job(model: LatentDiffusion, request: GenerateRequest, pixels: Tensor, small: Image.Image) -> Job:
    """What is to be run. pixels: (1, 3, h, w), the small picture with its margin."""
    asked = request.width, request.height
    resolved = resolve(model, request).model_copy(update={"strength": None})
    height, width = (SCALE * side for side in pixels.shape[2:])
    here = resolved.model_copy(update={"width": width, "height": height})
    sigmas = sigmas_for(model, here)
    start = float(sigmas[0])
    stage = Stage(model, here, told_over(model, here, sigmas), sigmas, lambda noise, _: start_state(noise.start, start))
    recorded = resolved.model_copy(update=dict(zip(("width", "height"), asked, strict=True)))
    return Job(recorded, [stage], finish=lambda image: image.crop((0, 0, SCALE * small.width, SCALE * small.height)))


def _check_size(small: Image.Image, request: GenerateRequest) -> None:
    width, height = small.size
    if max(small.size) > MAX_SIDE or SCALE**2 * width * height > MAX_PIXELS:
        raise LdmError(
            f"image: found {width}x{height}, expected sides of at most {MAX_SIDE} and {MAX_PIXELS // SCALE**2} pixels"
            " in all to enlarge; cut it, or scale it down"
        )
    for name, given, side in (("width", request.width, width), ("height", request.height, height)):
        if given not in (None, SCALE * side):
            raise LdmError(f"{name}: found {given}, expected {SCALE * side}, four times the picture's; leave it out")


def _padded(pixels: Tensor) -> Tensor:
    """(1, 3, h, w) with sides that are multiples of 8, by repeating the right and the lower edge."""
    height, width = pixels.shape[2:]
    return F.pad(pixels, (0, -width % LATENT_MULTIPLE, 0, -height % LATENT_MULTIPLE), mode="replicate")


def _shown(pixels: Tensor, level: int, told: ToldOver, request: GenerateRequest) -> ToldOver:
    """`told` with the small picture (1, 3, h, w) noised to `level`, and the level, on both sides of guidance."""
    levels = torch.tensor([level])
    alpha, sigma = (float(weight) for weight in upscaler().alpha_sigma(levels))
    noise = start_noise(pixels.shape[1:], [other_seed(request)]).to(pixels)
    concat, labels = alpha * pixels + sigma * noise, levels.to(pixels.device)

    def with_picture(cond: Conditioning) -> Conditioning:
        return cond.with_(concat=concat, vector=labels)

    def with_pictures(one: Told) -> Told:
        parts = tuple((with_picture(cond), weight) for cond, weight in one.parts)
        return Told(parts, None if one.uncond is None else with_picture(one.uncond))

    return [(sigma_from, with_pictures(one)) for sigma_from, one in told]

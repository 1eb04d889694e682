"""The high-resolution second pass: a finished picture is made larger, noised, and denoised again at its new size.

A U-Net draws well near the size that it was trained at. Composed there and only sharpened beyond it, a large picture
keeps one subject and one horizon (what AUTOMATIC1111's web UI calls "Hires. fix").
Shapes: B batch, z latent channels, h and w latent height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.diffusion.noise import PerImageNoise
from ldm.diffusion.state import finish_state, noised
from ldm.errors import LdmError
from ldm.models.tiny_autoencoder import TinyAutoencoder
from ldm.pipeline.first_stage import decode
from ldm.pipeline.images import MAX_PIXELS, to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import Show, last_steps, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest, whole_steps
from ldm.pipeline.sample import Stage


def second_pass(first: Stage, show: Show) -> Stage:
    """The pass that `request.highres` asks for after this one. Its prompt is told anew: for its size, over its steps.

    Each picture's noise is the noise of its seeds at the new size. show: as of `txt2img_job`. Raises `LdmError` where
    the larger size is none, or is beyond 16 Mpx, or an autoencoder without an encoder is to enlarge the picture.
    """
    model, request = first.model, _larger(first.request)
    highres = request.highres
    assert highres is not None and request.width is not None and request.height is not None
    if isinstance(model.autoencoder, TinyAutoencoder) and highres.upscale != "latent":
        model.autoencoder.checked_encoder()  # now, and not when the first pass is done
    tell, _ = show(model, request)
    steps = highres.steps or request.steps
    sigmas = last_steps(sigmas_for(model, request, steps=steps), whole_steps(highres.strength, steps))
    end, start = float(first.sigmas[-1]), float(sigmas[0])
    size = request.width, request.height

    def begin(noise: PerImageNoise, x: Tensor | None) -> Tensor:
        assert x is not None
        latents = finish_state(x, end)
        if highres.upscale == "latent":
            latents = F.interpolate(latents, noise.start.shape[2:], mode="bilinear", align_corners=False)
        else:
            latents = torch.cat([_larger_picture(model, latent[None], size) for latent in latents])
        return noised(latents, noise.start, start)

    return Stage(model, request, told_over(model, request, sigmas, tell), sigmas, begin)


def _larger(request: GenerateRequest) -> GenerateRequest:
    """The resolved request at the size of the second pass, which may be beyond what may be asked for at once."""
    assert request.highres is not None and request.width is not None and request.height is not None
    before, scale = (request.width, request.height), request.highres.scale
    width, height = (8 * round(side * scale / 8) for side in before)
    sizes = f"highres.scale: {scale:g} times {before[0]}x{before[1]} is {width}x{height}"
    if (width, height) == before:
        raise LdmError(f"{sizes} in multiples of 8, expected a larger picture; raise it")
    if width * height > MAX_PIXELS:
        raise LdmError(f"{sizes}, expected at most {MAX_PIXELS} pixels in all; lower it")
    return request.model_copy(update={"width": width, "height": height})


def _larger_picture(model: LatentDiffusion, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """A latent (1, z, h, w) -> that of its picture at a (width, height), by Lanczos."""
    pixels, _ = decode(model.present(model.autoencoder), latent, model.vae_tile)
    return model.latent_of(to_image(pixels[0]).resize(size, Image.Resampling.LANCZOS))

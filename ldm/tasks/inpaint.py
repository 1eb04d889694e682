"""Inpainting: a part of a picture is redrawn, and every pixel outside of it stays bit for bit.

A model that was trained for it is shown the mask and the picture around it (Rombach et al. 2022, section 4.5). Any
other one is held to the picture outside of the mask: there the denoiser's answer is replaced by the picture's latent.
A sampler that is told one and the same latent at every level is at that latent plus noise of just that level, whatever
its order, and with fresh noise where it draws some. So the kept part needs no replacing step by step (Lugmayr et al.
2022, eq. 8), and what the network sees around the hole is always noised by as much, and by the same noise, as the hole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.noise import PerImageNoise
from ldm.diffusion.state import noised, spread, start_state
from ldm.errors import LdmError
from ldm.pipeline.images import picture_bytes, read_picture, to_tensor
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.masks import Mask, Window, fade, mask_of, pasted, window_for
from ldm.pipeline.prepare import as_trained, has_mask, last_steps, resolve, sigmas_for, told_over
from ldm.pipeline.request import Control, GenerateRequest, MaskFill
from ldm.pipeline.sample import Job, Picture, Progress, Stage, run
from ldm.tasks.refine import handed_over
from ldm.types import Denoise


@torch.inference_mode()
def inpaint(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Redraw `request.image` where `request.mask` says, see `GenerateRequest`; the pictures have the size of `image`.

    Raises `LdmError` where there is no picture or no mask, where the two do not fit or nothing is to be redrawn, and as
    `ldm.pipeline.sample.run` does.
    """
    for name in ("image", "mask"):
        if getattr(request, name) is None:
            raise LdmError(f"{name}: found none, expected a picture to redraw and a mask; give {name}")
    assert request.image is not None
    picture = read_picture(request.image)
    yield from redraw(model, request, picture, mask_of(request))


def redraw(
    model: LatentDiffusion, request: GenerateRequest, picture: Image.Image, mask: Mask
) -> Iterator[Progress | Picture]:
    """Redraw a picture where its mask (H, W) is above 0; below 1, in that share of the steps that are run.

    With a model that is shown the mask, the first step is free everywhere, as in its training.
    """
    window = window_for(mask, request, model.config.size)
    request = resolve(model, request.changed(width=window.size[0], height=window.size[1]))
    part = window.of(picture)
    latent = model.latent_of(part)
    shares = window.pooled(mask, latent.shape[3], latent.shape[2]).to(latent)
    inside = (window.pooled(mask, *window.size) > 0).float()
    tell, notes = as_trained(model, request, (to_tensor(part)[None], inside))
    shown = has_mask(model) and not request.mask_soft
    sigmas = last_steps(sigmas_for(model, request), request.steps_to_run)
    level = float(sigmas[0])
    at_once = torch.ones_like(shares, dtype=torch.bool) if shown else shares == 1

    def start(noise: PerImageNoise, _: Tensor | None) -> Tensor:
        filled = fill(request.mask_fill, latent, noise.start, level)
        return torch.where(at_once, filled, noised(latent, noise.start, level))

    stage = Stage(
        model,
        request.model_copy(update={"controls": within(request.controls, picture.size, window)}),
        told_over(model, request, sigmas, tell),
        sigmas,
        start,
        hold=None if shown else lambda denoise: held(denoise, latent, shares, sigmas),
    )
    alpha = fade(mask, request.mask_blur)
    job = Job(
        request,
        handed_over(stage),
        finish=lambda drawn: pasted(picture, drawn, window, alpha),
        notes=(*notes, *window.notes),
    )
    yield from run(model, job)


def within(controls: tuple[Control, ...], size: tuple[int, int], window: Window) -> tuple[Control, ...]:
    """What the controls show of a window, for those that show all of a picture of `size`."""
    shown: list[Control] = []
    for control in controls:
        image = read_picture(control.image)
        same = image.size == size
        shown.append(control.model_copy(update={"image": picture_bytes(window.of(image))}) if same else control)
    return tuple(shown)


def fill(kind: MaskFill, latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The state (B, z, h, w) at `sigma` that a hole starts from: the picture's latent (1, z, h, w) or zeros, noised by
    unit `noise`, or nothing but noise, with the variance that noised latents have."""
    match kind:
        case "original":
            return noised(latent, noise, sigma)
        case "zero":
            return noised(torch.zeros_like(latent), noise, sigma)
        case "noise":
            return start_state(noise, sigma)


def held(denoise: Denoise, latent: Tensor, shares: Tensor, sigmas: Tensor) -> Denoise:
    """A denoiser that answers `latent` (1, z, h, w) wherever the steps left are more than a cell's share of them all.

    shares: (1, 1, h, w) in 0..1: 0 is never free, 1 always (Levin and Fried 2023, with the level in place of the step).
    sigmas: (n + 1,) of the run; what is asked within a step belongs to it.
    """
    steps = len(sigmas) - 1
    levels = sigmas[:-1].double() * (1 + 1e-5)

    def hold(x: Tensor, sigma: Tensor) -> Tensor:
        step = torch.searchsorted(-levels, -sigma.double().to(levels.device), right=True) - 1
        free = shares * steps + spread(step.clamp(min=0), x) > steps - 0.5
        return torch.where(free, denoise(x, sigma), latent)

    return hold

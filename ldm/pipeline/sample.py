"""THE loop: from a prepared start over a sampler's steps to decoded pictures. Every task runs this one.

It is a generator, so progress, preview, cancelling and timing live in the caller.
Shapes: B pictures of a batch, z latent channels, h and w latent height and width, H and W picture height and width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.noise import PerImageNoise, per_image_noise
from ldm.diffusion.state import finish_state
from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.pipeline.control import Controlled, idle, prepare_hints, told
from ldm.pipeline.device import is_out_of_memory
from ldm.pipeline.embeddings import used_in
from ldm.pipeline.images import to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.picture import Picture
from ldm.pipeline.request import GenerateRequest
from ldm.samplers import SAMPLERS
from ldm.types import Conditioning, Denoise, NoiseSource, Step

MAX_BATCH = 8
BATCH_PIXELS = 8 * 512 * 512
"""A batch holds at most this many pictures and pixels."""


@dataclass(frozen=True)
class Progress:
    """Pictures `first` ... `first + count - 1` of a request have done `done` of `steps` steps.

    step: the step just done; None before the first one.
    """

    first: int
    count: int
    done: int
    steps: int
    step: Step | None = None


@dataclass(frozen=True)
class Job:
    """What a task prepares for the loop.

    request: resolved, so that width, height, schedule and seed are given
    cond, uncond: of batch 1; uncond is None where guidance is 1
    sigmas:  (n + 1,) the levels to be run
    start:   makes the state at sigmas[0], (B, z, h, w), of a batch's noise
    notes:   for every picture
    """

    request: GenerateRequest
    cond: Conditioning
    uncond: Conditioning | None
    sigmas: Tensor
    start: Callable[[PerImageNoise], Tensor]
    notes: tuple[str, ...] = ()


@torch.inference_mode()
def run(model: LatentDiffusion, job: Job) -> Iterator[Progress | Picture]:
    """Draw the job's pictures, batch by batch; each batch yields its steps, then its pictures in order.

    A batch that does not fit into memory is halved. Raises `LdmError` when one picture does not, and when a step or
    a decoded picture is not finite.
    """
    request = job.request
    job, denoiser = _controlled(model, job)
    count, size = request.count, batch_size(request)
    first = 0
    while first < count:
        here = min(size, count - first)
        try:
            for event in _batch(model, denoiser, job, first, here):
                first += isinstance(event, Picture)
                yield event
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, which keeps the failed batch's tensors alive.
        if here == 1:
            raise LdmError(
                f"width x height: no memory left on {model.device} for one picture of"
                f" {request.width}x{request.height}; make it smaller, or try --dtype bfloat16 or another --device"
            )
        size = here // 2
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def batch_size(request: GenerateRequest) -> int:
    """How many pictures of a resolved request are drawn at once."""
    assert request.width is not None and request.height is not None
    return max(1, min(MAX_BATCH, BATCH_PIXELS // (request.width * request.height)))


def _controlled(model: LatentDiffusion, job: Job) -> tuple[Job, Denoiser]:
    """The job and what denoises, with the ControlNets that the request names, if any."""
    denoiser = model.denoiser()
    hints = prepare_hints(model, job.request, job.sigmas)
    job = replace(job, notes=(*job.notes, *idle(job.request, job.sigmas)))
    if not hints:
        return job, denoiser
    uncond = None if job.uncond is None else told(job.uncond, hints, wanted=False)
    job = replace(job, cond=told(job.cond, hints, wanted=True), uncond=uncond)
    return job, replace(denoiser, network=Controlled(denoiser.network, hints), dtype=model.dtype)


def _batch(
    model: LatentDiffusion, denoiser: Denoiser, job: Job, first: int, count: int
) -> Iterator[Progress | Picture]:
    """Pictures first ... first + count - 1: picture i depends on seed + i and not on its batch."""
    begun = time.perf_counter()
    request = job.request
    assert request.seed is not None and request.width is not None and request.height is not None
    seeds = range(request.seed + first, request.seed + first + count)
    noise = per_image_noise(model.latent_shape(request.width, request.height), seeds, device=model.device)
    uncond = None if job.uncond is None else job.uncond.repeat(count)
    denoise = guided(denoiser, job.cond.repeat(count), uncond, request.guidance, rescale=request.rescale)
    if request.sampler == "lcm":
        denoise = consistency(denoise, model.schedule)
    used = used_in(model.embeddings, request.prompt, request.negative)
    embeddings = tuple((embedding.name, embedding.hash) for embedding in used)
    steps = len(job.sigmas) - 1
    yield Progress(first, count, 0, steps)
    x = job.start(noise)
    for step in denoise_steps(request, denoise, x, job.sigmas, noise):
        x = step.x
        yield Progress(first, count, step.index + 1, steps, step)
    latents = finish_state(x, float(job.sigmas[-1]))
    share = (time.perf_counter() - begun) / count
    for index, seed in enumerate(seeds):
        begun = time.perf_counter()
        pixels, notes = decode(model.autoencoder, latents[index : index + 1])
        yield Picture(
            image=to_image(pixels[0]),
            index=first + index,
            seed=seed,
            request=request.model_copy(update={"seed": seed, "count": 1}),
            model=model.origin.name,
            dtype=str(model.dtype).removeprefix("torch."),
            notes=(*job.notes, *notes),
            seconds=share + time.perf_counter() - begun,
            adapters=model.adapters,
            embeddings=embeddings,
            parts=model.origin.parts,
        )


def denoise_steps(
    request: GenerateRequest, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: NoiseSource
) -> Iterator[Step]:
    """The sampler's steps, each checked. Raises `LdmError` naming the first one that is not finite."""
    sampler = SAMPLERS[request.sampler].sample
    if request.eta is not None:
        sampler = partial(sampler, eta=request.eta)  # pyright: ignore[reportCallIssue]
    for step in sampler(denoise, x, sigmas, noise):
        if not torch.isfinite(step.x).all():
            raise LdmError(
                f"denoising: step {step.index + 1} of {len(sigmas) - 1} (sigma {step.sigma:.4g}) gave values that are"
                " not finite; the file is damaged, or try --dtype float32"
            )
        yield step


def decode(autoencoder: AutoencoderKL, latents: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Latents (B, z, h, w) -> pictures (B, 3, H, W) in [-1, 1], and notes about them.

    What is not finite is decoded again in float32 (half precision overflows in some autoencoders). Raises `LdmError`
    where that does not help: there is never a black picture in place of an error.
    """
    notes: tuple[str, ...] = ()
    dtype = next(autoencoder.parameters()).dtype
    pixels = autoencoder.decode(latents.to(dtype)).float()
    if not torch.isfinite(pixels).all() and dtype != torch.float32:
        notes = (f"decoded in float32, since the autoencoder overflowed in {str(dtype).removeprefix('torch.')}",)
        pixels = copy.deepcopy(autoencoder).float().decode(latents.float())
    if not torch.isfinite(pixels).all():
        raise LdmError("autoencoder: the decoded picture is not finite; its part of the file is damaged")
    pixels = pixels.clamp(-1, 1)
    if bool((pixels.flatten(2).std(dim=2) < 2 / 255).all(dim=1).any()):
        notes = (*notes, "the picture is of one colour")
    return pixels, notes

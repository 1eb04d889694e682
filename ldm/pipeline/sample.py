"""THE loop: from a prepared start over a sampler's steps to decoded pictures. Every task runs this one.

It is a generator, so progress, preview, cancelling and timing live in the caller.
Shapes: B pictures of a batch, z latent channels, h and w latent height and width, H and W picture height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.consistency import consistency
from ldm.diffusion.guidance import Guidance, Projection, Told, guided
from ldm.diffusion.noise import PerImageNoise, per_image_noise
from ldm.diffusion.state import finish_state
from ldm.errors import LdmError
from ldm.models.feature_reuse import FeatureReuse
from ldm.models.same_text import SameText
from ldm.models.unet import UNet, merging_tokens
from ldm.pipeline.control import Controlled, Hint, acted_on, prepare_hints
from ldm.pipeline.device import is_out_of_memory
from ldm.pipeline.first_stage import decode
from ldm.pipeline.images import to_image
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.notes import notes_on
from ldm.pipeline.picture import OtherPart, Picture
from ldm.pipeline.prepare import begun_between
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.text.embeddings import used_in
from ldm.samplers import SAMPLERS
from ldm.types import Denoise, Network, NoiseSource, Step

LONG_WARM_UP = 1.0
"""From how many seconds on it is said what compiling took."""

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


Start = Callable[[PerImageNoise, Tensor | None], Tensor]
"""A batch's noise, and the state (B, z, h, w) that the stage before ended with, None for the first -> a state."""

Hold = Callable[[Denoise], Denoise]
"""Something put around a batch's denoiser: what holds to a mask."""


@dataclass(frozen=True)
class Stage:
    """One run of the sampler: from noise, from a picture, or from where the stage before ended.

    model:   whose U-Net denoises
    request: resolved, with this stage's own width and height
    told:    from which level on the U-Net is told what, as `ldm.diffusion.guidance.guided` wants it
    sigmas:  (n + 1,) the levels to be run
    start:   makes the state at sigmas[0]
    hold:    see `Hold`
    """

    model: LatentDiffusion
    request: GenerateRequest
    told: Sequence[tuple[float, Told]]
    sigmas: Tensor
    start: Start
    hold: Hold | None = None

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Job:
    """What a task prepares for the loop.

    request: resolved, so that width, height, schedule and seed are given
    stages:  run one after another; the last one's model decodes
    finish:  what is done with each decoded picture
    notes:   for every picture
    """

    request: GenerateRequest
    stages: Sequence[Stage]
    finish: Callable[[Image.Image], Image.Image] | None = None
    notes: tuple[str, ...] = ()


@torch.inference_mode()
def run(model: LatentDiffusion, job: Job) -> Iterator[Progress | Picture]:
    """Draw the job's pictures, batch by batch; each batch yields its steps, then its pictures in order.

    model: what a picture's metadata names. A batch that does not fit into memory is halved; where one picture does not,
    networks that wait elsewhere come block by block from then on. Raises `LdmError` when it does not fit even so, and
    when a step or a decoded picture is not finite.
    """
    stages = [_controlled(stage) for stage in job.stages]
    runs = [(stage.request, stage.steps) for stage in job.stages]
    job = replace(job, notes=(*job.notes, *notes_on(model, job.request, runs)))
    count = job.request.count
    size = most = min(batch_size(stage.request) for stage in job.stages)
    first = 0
    while first < count:
        here, denoising = min(size, count - first), True
        try:
            for event in _batch(model, stages, job, first, here):
                first += isinstance(event, Picture)
                denoising = isinstance(event, Progress) and event.done < event.steps
                yield event
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, which keeps the failed batch's tensors alive.
        if here > 1:
            size = here // 2
        elif denoising and any(_can_come_in_blocks(stage) for stage, _ in stages):
            size = most
            stages = [(_in_blocks(stage) if _can_come_in_blocks(stage) else stage, hints) for stage, hints in stages]
            job = replace(job, notes=(*job.notes, "offload blocks: with whole networks there was no memory left"))
        else:
            raise _too_large(max((stage for stage, _ in stages), key=lambda stage: _pixels(stage.request)))
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _can_come_in_blocks(stage: Stage) -> bool:
    """Whether the networks that denoise wait elsewhere, and come as a whole without having to."""
    return stage.model.offload == "parts" and stage.model.compiler is None


def _in_blocks(stage: Stage) -> Stage:
    return replace(stage, model=replace(stage.model, offload="blocks"))


def _too_large(stage: Stage) -> LdmError:
    model, request = stage.model, stage.request
    if model.device.type != "cuda" or model.offload == "blocks":
        remedy = "--dtype bfloat16"
    else:
        remedy = "--offload parts" if model.compiler is not None else "--offload blocks"
    return LdmError(
        f"width x height: no memory left on {model.device} for one picture of {request.width}x{request.height}; make it"
        f" smaller, or try {remedy} or another --device"
    )


def batch_size(request: GenerateRequest) -> int:
    """How many pictures of a resolved request are drawn at once."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS // _pixels(request)))


def _pixels(request: GenerateRequest) -> int:
    assert request.width is not None and request.height is not None
    return request.width * request.height


def _controlled(stage: Stage) -> tuple[Stage, tuple[Hint, ...]]:
    """The stage, told of the ControlNets that its request names, if any, and these."""
    hints = prepare_hints(stage.model, stage.request, stage.sigmas)
    heard = [(sigma, _hear(told, hints)) for sigma, told in stage.told]
    return (replace(stage, told=heard) if hints else stage), hints


def _hear(told: Told, hints: tuple[Hint, ...]) -> Told:
    """The same, with word of which ControlNets act on which side of guidance."""
    parts = tuple((acted_on(cond, hints, wanted=True), weight) for cond, weight in told.parts)
    return Told(parts, None if told.uncond is None else acted_on(told.uncond, hints, wanted=False))


def _batch(
    model: LatentDiffusion, stages: Sequence[tuple[Stage, tuple[Hint, ...]]], job: Job, first: int, count: int
) -> Iterator[Progress | Picture]:
    """Pictures first ... first + count - 1: picture i depends on seed + i and not on its batch."""
    begun = time.perf_counter()
    total, done = sum(stage.steps for stage, _ in stages), 0
    yield Progress(first, count, 0, total)
    x, noise, took = None, None, list[float]()
    for stage, hints in stages:
        shape = _latent_shape(stage)
        if noise is None or noise.start.shape[1:] != shape:
            noise = _noise(job.request, shape, first, count, stage.model.device)
        x = stage.start(noise, x)
        for step in _steps(stage, hints, x, noise):
            x, done = step.x, done + 1
            took.append(time.perf_counter() - begun)
            yield Progress(first, count, done, total, step)
            begun = time.perf_counter()
    assert x is not None
    last = stages[-1][0]
    job = replace(job, notes=(*job.notes, *_warm_up(model, took)))
    latents = finish_state(x, float(last.sigmas[-1]))
    share = sum(took) / count
    autoencoder = last.model.present(last.model.autoencoder)
    for index in range(count):
        request = alone(job.request, first + index)
        begun = time.perf_counter()
        pixels, notes = decode(autoencoder, latents[index : index + 1], last.model.vae_tile)
        image = to_image(pixels[0])
        yield Picture(
            image=image if job.finish is None else job.finish(image),
            index=first + index,
            seed=request.seed or 0,
            request=request,
            model=model.origin.name,
            dtype=str(model.dtype).removeprefix("torch."),
            notes=(*job.notes, *notes),
            seconds=share + time.perf_counter() - begun,
            adapters=model.adapters,
            embeddings=_embeddings(model, request),
            batch=(index, count),
            compiled=model.compiler is not None,
            store=last.model.store,
            parts=_parts(model, last.model, request),
        )


def _warm_up(model: LatentDiffusion, took: Sequence[float]) -> Iterator[str]:
    """A note on how long compiling took. took: the seconds of each step."""
    if model.compiler is not None and len(took) > 1 and took[0] - took[1] > LONG_WARM_UP:
        yield f"compiled: the first step took {took[0] - took[1]:.0f} s longer than the second"


def _parts(model: LatentDiffusion, last: LatentDiffusion, request: GenerateRequest) -> tuple[OtherPart, ...]:
    """Where all that a picture is of came from, but for the model's own file. last: whose steps were the last ones."""
    prior = () if model.prior is None or request.prior is None else model.prior.parts
    return (*model.origin.parts, *prior, *(() if last is model else last.origin.as_refiner))


def alone(request: GenerateRequest, index: int) -> GenerateRequest:
    """A resolved request for one of its pictures."""
    assert request.seed is not None
    own: dict[str, Any] = {"count": 1, "seed": request.seed + index}
    if request.rng == "comfy":
        own |= {"seed": request.seed, "batch_index": request.batch_index + index}
    if request.variation_seed is not None:
        own["variation_seed"] = request.variation_seed + index
    return request.model_copy(update=own)


def together(request: GenerateRequest, place: int, size: int) -> GenerateRequest:
    """The way back from `alone`: the request of all `size` pictures of a batch, of one that had this place in it.

    Raises `LdmError` where there can be no such batch.
    """
    assert request.seed is not None
    counted = {"batch_index": request.batch_index} if request.rng == "comfy" else {"seed": request.seed}
    if request.variation_seed is not None:
        counted["variation_seed"] = request.variation_seed
    if not 0 <= place < size <= MAX_BATCH or min(counted.values()) < place:
        raise LdmError(f"batch: found place {place} of {size}, expected one that fits the seed; the record is damaged")
    return request.changed(count=size, **{name: value - place for name, value in counted.items()})


def _noise(
    request: GenerateRequest, shape: tuple[int, int, int], first: int, count: int, device: torch.device
) -> PerImageNoise:
    """The noise of a batch's pictures, each from its own seeds."""
    each = [alone(request, first + index) for index in range(count)]
    others = [one.variation_seed for one in each if one.variation_seed is not None]
    return per_image_noise(
        shape,
        [one.seed or 0 for one in each],
        device=device,
        rng=request.rng,
        batch_index=each[0].batch_index,
        variation=(others, request.variation_strength) if others else None,
        brownian=SAMPLERS[request.sampler].brownian,
    )


def _latent_shape(stage: Stage) -> tuple[int, int, int]:
    assert stage.request.width is not None and stage.request.height is not None
    return stage.model.latent_shape(stage.request.width, stage.request.height)


def _steps(stage: Stage, hints: tuple[Hint, ...], x: Tensor, noise: PerImageNoise) -> Iterator[Step]:
    """A stage's steps for a batch; what waits elsewhere, as `offloaded` says, is on the device until the last one."""
    yield from denoise_steps(stage.request, _denoise(stage, hints, noise), x, stage.sigmas, noise)


def _denoise(stage: Stage, hints: tuple[Hint, ...], noise: PerImageNoise) -> Denoise:
    """The stage's denoiser for a whole batch: guided, held to its mask, and made consistent where the sampler wants."""
    model, count = stage.model, len(noise.start)
    denoiser = model.denoiser()
    network = _cheaper(denoiser.network, stage.request)
    if hints:
        network = Controlled(network, tuple(replace(hint, network=model.denoising(hint.network)) for hint in hints))
    if model.offload != "blocks" and model.compiler is None:  # blocks that come and go, or guard what they are given
        network = SameText(network)
    denoiser = replace(denoiser, network=network, dtype=model.dtype)
    denoise = guided(denoiser, [(sigma, _repeated(told, count)) for sigma, told in stage.told], guidance_of(stage))
    if stage.hold is not None:
        denoise = stage.hold(denoise)
    return consistency(denoise, model.schedule) if stage.request.sampler == "lcm" else denoise


def _cheaper(network: Network, request: GenerateRequest) -> Network:
    """The U-Net with merged tokens and a memory of its own for one batch; control networks stay as they are, and are
    asked at every step."""
    if request.merge_tokens > 0:
        network = merging_tokens(cast(UNet, network), request.merge_tokens)
    return FeatureReuse(cast(UNet, network), request.reuse) if request.reuse > 1 else network


def _repeated(told: Told, count: int) -> Told:
    """What is told to one picture, told to all of a batch."""
    parts = tuple((cond.repeat(count), weight) for cond, weight in told.parts)
    return Told(parts, None if told.uncond is None else told.uncond.repeat(count))


def guidance_of(stage: Stage) -> Guidance:
    """How a stage's request is guided."""
    request, apg = stage.request, stage.request.apg
    return Guidance(
        request.guidance,
        rescale=request.rescale,
        interval=_levels_between(stage.sigmas, request.guidance_start, request.guidance_end),
        perturbed=request.perturbed,
        apg=None if apg is None else Projection(apg.parallel, apg.norm, apg.momentum),
    )


def _levels_between(sigmas: Tensor, start: float, end: float) -> tuple[float, float] | None:
    """(low, high) of the steps that begin between two shares of all, None for all of them.

    What a step asks on its way goes with it, and what it asks at its end goes with the next.
    """
    levels: list[float] = sigmas.tolist()
    inside = begun_between(len(levels) - 1, start, end)
    if len(inside) == len(levels) - 1:
        return None
    return (levels[inside[-1] + 1] * (1 + 1e-5), levels[inside[0]]) if inside else (math.inf, math.inf)


def _embeddings(model: LatentDiffusion, request: GenerateRequest) -> tuple[tuple[str, str], ...]:
    used = used_in(model.embeddings, request.prompt, request.negative)
    return tuple((embedding.name, embedding.hash) for embedding in used)


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

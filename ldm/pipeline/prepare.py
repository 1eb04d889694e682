"""From a request to what the loop needs: what was left to a default, the noise levels, what the U-Net is told."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.guidance import Told
from ldm.diffusion.sigmas import SCHEDULES, end_above_zero
from ldm.errors import LdmError
from ldm.pipeline.clip.prior import imagined
from ldm.pipeline.first_stage import encode
from ldm.pipeline.images import read_picture, shape_like
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.text.prompt import Emphasis, adapters_in, alternatives, schedule_of
from ldm.samplers import SAMPLERS
from ldm.types import Conditioning
from ldm.weights.io import printable

Tell = Callable[[Conditioning], Conditioning]
"""What a task adds to what the prompt says: extra channels, a vector."""

Show = Callable[[LatentDiffusion, GenerateRequest], tuple[Tell, tuple[str, ...]]]
"""What a task shows a model beside the latent, at the size of a resolved request, and notes; `as_trained` is one."""

Spans = tuple[tuple[int, str], ...]
"""What a prompt says over the steps: (from this one on, what)."""

LEADING_STEPS = 3
"""With fewer steps the levels of "leading" begin in what is half a picture, or all of it, and no noise can be drawn."""

CHANGING: tuple[Emphasis, ...] = ("a1111", "no-norm", "ignore")
"""Whose rules have prompts that change with the steps, and of several parts."""


def resolve(model: LatentDiffusion, request: GenerateRequest) -> GenerateRequest:
    """The request with its size, schedule, seeds and, where there is a picture to start from, strength filled in.

    Raises `LdmError` where it asks for a prior, and the model has none.
    """
    if request.prior is not None and model.prior is None:
        raise LdmError("prior: found with a model that has none, expected one; give it by --prior, or by with_prior")
    width, height = size_of(request, model.config.size)
    return seeded(request).changed(
        width=width,
        height=height,
        schedule=_schedule(model, request),
        strength=request.strength if request.image is None else request.share,
    )


def size_of(request: GenerateRequest, side: int) -> tuple[int, int]:
    """(width, height) of a request's pictures, of the first pass over them where there are two.

    Where it names none, those of the picture that it starts from or follows, else of a square of `side`, the model's.
    """
    width = height = side
    picture = request.image or request.depth or next((control.image for control in request.controls), None)
    if picture is not None and not (request.width and request.height):
        width, height = shape_like(read_picture(picture).size, side)
    return request.width or width, request.height or height


def seeded(request: GenerateRequest) -> GenerateRequest:
    """The request with its seeds filled in."""
    varied = bool(request.variation_strength)
    return request.changed(seed=_seed(request.seed), variation_seed=_seed(request.variation_seed) if varied else None)


def _schedule(model: LatentDiffusion, request: GenerateRequest) -> str:
    """The request's schedule, or what suits the sampler and the model; where a table is the model's own, that one."""
    schedule = request.schedule or SAMPLERS[request.sampler].schedule
    begins_too_low = schedule == "leading" and request.steps < LEADING_STEPS
    if request.schedule is None and (model.config.zero_terminal_snr or begins_too_low):
        schedule = "trailing"
    aligned_for_sdxl = schedule == "align-your-steps" and model.config.family in ("sdxl", "sdxl-refiner")
    return "align-your-steps-sdxl" if aligned_for_sdxl else schedule


def _seed(seed: int | None) -> int:
    """The seed, drawn where none was given; small enough for every program that reads it."""
    return secrets.randbelow(2**32) if seed is None or seed == -1 else seed


def sigmas_for(model: LatentDiffusion, request: GenerateRequest, *, steps: int | None = None) -> Tensor:
    """All levels of a resolved request, (n + 1,) falling. steps: other than the request's."""
    assert request.schedule is not None
    sigmas = SCHEDULES[request.schedule](model.schedule, steps or request.steps)
    return end_above_zero(sigmas, model.schedule) if SAMPLERS[request.sampler].ends_above_zero else sigmas


def last_steps(sigmas: Tensor, count: int) -> Tensor:
    """The levels of the last `count` steps."""
    return sigmas[-(count + 1) :]


def begun_between(steps: int, start: float, end: float) -> list[int]:
    """Which of so many steps begin between two shares of them all, the second one not included."""
    return [step for step in range(steps) if start <= step / steps < end]


def told_over(
    model: LatentDiffusion, request: GenerateRequest, sigmas: Tensor, tell: Tell = lambda cond: cond
) -> list[tuple[float, Told]]:
    """What a resolved request tells the U-Net over these levels: [(from this one down, what), ...].

    Several where the prompt changes with the steps. No negative side where guidance is 1 and the prompt is of one part.
    Raises `LdmError` where the prompt names an adapter that the model does not have.
    """
    steps = len(sigmas) - 1
    parts = prompt_spans(model, request, steps)
    negative = negative_spans(model, request, steps)
    zeros = request.empty_negative == "zeros" and not request.negative

    @cache
    def encoded(text: str, wanted: bool) -> Conditioning:
        cond = model.encode_prompt(
            text,
            width=request.width,
            height=request.height,
            original_size=request.original_size,
            crop=request.crop,
            clip_skip=request.clip_skip,
            emphasis=request.emphasis,
            wanted=wanted,
            zeros=zeros and not wanted,
        )
        if wanted and request.prior is not None and model.prior is not None:  # a refiner has none
            cond = model.tell_image(cond, imagined(model, text, request))
        return tell(cond)

    guides = request.guidance != 1 or [weight for _, weight in parts] != [1]
    changes = sorted({first for spans in (*(spans for spans, _ in parts), negative) for first, _ in spans})
    return [
        (
            _just_above(sigmas, first),
            Told(
                tuple((encoded(_at(spans, first), True), weight) for spans, weight in parts),
                encoded(_at(negative, first), False) if guides else None,
            ),
        )
        for first in changes
    ]


def prompt_spans(model: LatentDiffusion, request: GenerateRequest, steps: int) -> list[tuple[Spans, float]]:
    """The parts of the prompt: what each says over the steps, and its weight."""
    text = _without_adapters(model, request.prompt, request.emphasis)
    if request.emphasis not in CHANGING:
        return [(((0, text),), 1.0)]
    return [(schedule_of(part, steps), weight) for part, weight in alternatives(text)]


def negative_spans(model: LatentDiffusion, request: GenerateRequest, steps: int) -> Spans:
    """What the negative prompt says over the steps. It has no parts: AND is a word in it."""
    text = _without_adapters(model, request.negative, request.emphasis)
    return schedule_of(text, steps) if request.emphasis in CHANGING else ((0, text),)


def _at(spans: Spans, step: int) -> str:
    """The text that holds at a step."""
    return next(text for first, text in reversed(spans) if first <= step)


def _just_above(sigmas: Tensor, step: int) -> float:
    """A level just above a step's first one: what is asked at the end of the step before is told the same already."""
    return math.inf if step == 0 else float(sigmas[step]) * (1 + 1e-5)


def _without_adapters(model: LatentDiffusion, text: str, emphasis: Emphasis) -> str:
    """A prompt without its `<lora:...>` tags, all of which the model must have; taken literally, it has none."""
    if emphasis == "literal":
        return text
    rest, tags = adapters_in(text)
    have = [adapter.name for adapter in model.adapters]
    for tag in tags:
        if tag.name not in have:
            raise LdmError(
                f"prompt: names the adapter {tag.name!r}, expected one that the model was given"
                f" ({', '.join(have) or 'none'}); give it by --lora, or by with_adapters"
            )
    return rest


def as_trained(
    model: LatentDiffusion, request: GenerateRequest, around: tuple[Tensor, Tensor] | None = None
) -> tuple[Tell, tuple[str, ...]]:
    """What a task that gives no other picture to look at tells a model that wants one, and notes.

    An inpainting U-Net is shown the mask and the latent of the picture with grey inside of it (see `has_mask`).
    around: that picture, (1, 3, H, W) in [-1, 1], and the mask, (1, 1, H, W), 1 is inside; None: all is inside.
    Raises `LdmError` for a U-Net that cannot do without another picture.
    """
    notes: tuple[str, ...] = ()
    if model.config.image is not None and request.vary is None and request.prior is None:
        notes = ("this model varies pictures; it was given none, and draws from the text alone",)
    if not has_mask(model):
        return (lambda cond: cond), notes
    if around is None:
        assert request.width is not None and request.height is not None
        mask = torch.ones(1, 1, request.height, request.width)
        around = torch.zeros_like(mask).expand(-1, 3, -1, -1), mask
        notes = (*notes, "this is an inpainting model: all of the picture is masked")
    picture, mask = around
    outside = encode(model.present(model.autoencoder), picture * (1 - mask), model.vae_tile)
    cells = F.adaptive_max_pool2d(mask, outside.shape[2:]).to(outside)
    return partial(_with_channels, torch.cat([cells, outside], dim=1)), notes


def has_mask(model: LatentDiffusion) -> bool:
    """Whether the U-Net is shown a mask and what is around it, in channels of its own: an inpainting model.

    Raises `LdmError` for one whose channels are for something else.
    """
    latent_channels = model.config.autoencoder.latent_channels
    extra = model.config.unet.in_channels - latent_channels
    if extra not in (0, latent_channels + 1):
        remedies = {1: "give a depth map, as `ldm depth2img` does", 3: "give a small picture, as `ldm upscale` does"}
        raise LdmError(
            f"{printable(str(model.origin.path or 'model'))}: its U-Net takes {extra} extra channels beside the latent,"
            f" expected none; {remedies.get(extra, 'this kind has no task')}, or use another checkpoint"
        )
    return extra > 0


def _with_channels(channels: Tensor, cond: Conditioning) -> Conditioning:
    return cond.with_(concat=channels)

"""The tasks, a file each: they prepare a `Job`, and THE loop in `ldm.pipeline.sample` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import seeded
from ldm.pipeline.request import GenerateRequest, as_request
from ldm.pipeline.sample import Picture, Progress, alone
from ldm.tasks.depth2img import depth2img
from ldm.tasks.eta_variations import eta_variations
from ldm.tasks.img2img import img2img
from ldm.tasks.inpaint import inpaint
from ldm.tasks.outpaint import outpaint
from ldm.tasks.txt2img import txt2img
from ldm.tasks.upscale import is_upscaler, upscale
from ldm.tasks.variations import variations

Task = Callable[[LatentDiffusion, GenerateRequest], Iterator[Progress | Picture]]


def run(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Run the task that the request's fields ask for; see `ldm.pipeline.sample.run` for what is yielded."""
    if request.prior is not None and request.count > 1:
        return _each_alone(model, seeded(request))
    if request.image is not None and is_upscaler(model):
        return upscale(model, request)
    if request.vary is not None:
        return (eta_variations if request.vary_inverted else variations)(model, request)
    if request.depth is not None:
        return depth2img(model, request)
    if request.extend is not None:
        return outpaint(model, request)
    if request.mask is not None:
        return inpaint(model, request)
    return txt2img(model, request) if request.image is None else img2img(model, request)


def _each_alone(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Each picture as if it alone were asked for: what a prior makes of the prompt, it makes of each one's seed."""
    for index in range(request.count):
        for event in run(model, alone(request, index)):
            yield replace(event, index=index) if isinstance(event, Picture) else replace(event, first=index)


def draw(
    model: LatentDiffusion, request: str | GenerateRequest, fields: dict[str, Any], task: Task = run
) -> list[Picture]:
    """All pictures of a prompt with fields, or of a request with changes."""
    return pictures_of(task(model, as_request(request, fields)))


def pictures_of(events: Iterable[Progress | Picture]) -> list[Picture]:
    """What a task drew, without its steps."""
    return [event for event in events if isinstance(event, Picture)]

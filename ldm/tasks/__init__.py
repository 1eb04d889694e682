"""The tasks, a file each: they prepare a `Job`, and THE loop in `ldm.pipeline.sample` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest, as_request
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.img2img import img2img
from ldm.tasks.txt2img import txt2img


def run(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Run the task that the request's fields ask for; see `ldm.pipeline.sample.run` for what is yielded."""
    return txt2img(model, request) if request.image is None else img2img(model, request)


def draw(model: LatentDiffusion, request: str | GenerateRequest, fields: dict[str, Any]) -> list[Picture]:
    """All pictures of a prompt with fields, or of a request with changes."""
    return [event for event in run(model, as_request(request, fields)) if isinstance(event, Picture)]

"""Pictures that are each told an embedding of its own and may begin in noise of their own: frames of a sequence.

What Ramesh et al. 2022, section 3, shows with a decoder is made of them. A picture is there a pair (z, x_T): the
embedding, what CLIP sees in it, and the noise that DDIM makes it from, all that CLIP does not see.
Shapes: P width of the embedding, z latent channels, h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.diffusion.spherical import along_arc
from ldm.diffusion.state import start_state
from ldm.errors import LdmError
from ldm.pipeline.images import read_picture, shape_like
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import resolve, sigmas_for, told_over
from ldm.pipeline.request import GenerateRequest, as_request
from ldm.pipeline.sample import Job, Picture, Progress, Stage, run
from ldm.tasks.common import ToldOver, other_seed, refuse, seeing

NOT_TAKEN = ("image", "mask", "extend", "depth", "highres", "controls", "refine_at", "prior")
"""Fields that frames can do nothing with."""

NOT_AGAIN = "drawn from an embedding that its request does not name: this file alone cannot make it again"


@dataclass(frozen=True, eq=False)
class Frame:
    """What one picture is drawn from.

    request:   resolved, of this picture alone
    embedding: (1, P), what it is told of a picture; None: nothing, as where there is text alone
    start:     (1, z, h, w), the unit noise that it begins in; None: that of its seed
    """

    request: GenerateRequest
    embedding: Tensor | None
    start: Tensor | None = None


def draw_frames(
    model: LatentDiffusion, frames: Sequence[Frame], notes: tuple[str, ...] = (NOT_AGAIN,)
) -> Iterator[Progress | Picture]:
    """Draw each, in order. Raises `LdmError` as `LatentDiffusion.tell_image` and `ldm.pipeline.sample.run` do."""

    @cache
    def told(prompt: str) -> ToldOver:
        request = next(frame.request for frame in frames if frame.request.prompt == prompt)
        return told_over(model, request, sigmas_for(model, request))

    for index, frame in enumerate(frames):
        request, sigmas = frame.request, sigmas_for(model, frame.request)
        stage = Stage(
            model=model,
            request=request,
            told=[(sigma, _told_frame(model, now, frame)) for sigma, now in told(request.prompt)],
            sigmas=sigmas,
            start=partial(_begun, frame.start, float(sigmas[0])),
        )
        for event in run(model, Job(request, [stage], notes=notes)):
            yield replace(event, index=index) if isinstance(event, Picture) else replace(event, first=index)


def sequence_request(
    model: LatentDiffusion, request: GenerateRequest, picture: bytes | None, *, inverts: bool
) -> GenerateRequest:
    """A request for frames resolved, of the picture's shape where it names no size.

    inverts: whether noise is found by running DDIM backwards. Raises `LdmError` for fields that do not go with it.
    """
    refuse(request, (*NOT_TAKEN, "vary"), "a sequence of embeddings")
    if inverts and request.sampler != "ddim":
        raise LdmError(f"sampler: found {request.sampler}, expected ddim, the one that is run backwards; leave it out")
    if inverts and request.variation_strength:
        raise LdmError("variation_strength: found, expected 0, since a picture's own noise is no seed's; leave it out")
    if request.count != 1:
        raise LdmError(f"count: found {request.count}, expected 1; how many pictures there are, the sequence says")
    return resolve(model, shaped_like(model, request, picture))


def shaped_like(model: LatentDiffusion, request: GenerateRequest, picture: bytes | None) -> GenerateRequest:
    """The request with the picture's shape at the model's size where it names none."""
    if picture is None:
        return request
    width, height = shape_like(read_picture(picture).size, model.config.size)
    return request.changed(width=request.width or width, height=request.height or height)


def as_sequence(request: str | GenerateRequest, fields: dict[str, Any]) -> GenerateRequest:
    """`as_request`, where a text means DDIM without guidance: what gives a picture back from its own noise."""
    return as_request(request, fields if isinstance(request, GenerateRequest) else GIVES_BACK | fields)


GIVES_BACK: dict[str, Any] = {"sampler": "ddim", "guidance": 1.0}
"""Fields with which a decoded pair (z, x_T) is the picture again."""


def evenly(count: int, most: float = 1.0) -> list[float]:
    """`count` numbers from 0 to `most`, both included. Raises `LdmError` for fewer than two."""
    if count < 2:
        raise LdmError(f"frames: found {count}, expected 2 or more, since both ends are among them")
    return [most * index / (count - 1) for index in range(count)]


def arc(start: Tensor, end: Tensor, shares: Sequence[float], what: str) -> list[Tensor]:
    """The points at these shares, see `along_arc`; `what` the ends are. Raises `LdmError` where there is no one arc."""
    try:
        return [along_arc(start, end, share) for share in shares]
    except ValueError as error:
        raise LdmError(f"{what}: {error}; choose others") from None


def _told_frame(model: LatentDiffusion, told: Told, frame: Frame) -> Told:
    if frame.embedding is None:
        return told
    level = frame.request.vary_noise
    seed = other_seed(frame.request) if level else 0  # level 0 has a little noise too: the same for all, and inversion
    return seeing(told, partial(model.tell_image, embedding=frame.embedding, noise_level=level, seed=seed))


def _begun(start: Tensor | None, sigma: float, noise: Any, _: Tensor | None) -> Tensor:
    return start_state(noise.start if start is None else start.to(noise.start), sigma)

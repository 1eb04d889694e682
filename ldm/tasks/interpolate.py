"""From one picture to another: the pictures between them (Ramesh et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.frames import Frame, arc, draw_frames, evenly, sequence_request
from ldm.tasks.invert import inverting


@torch.inference_mode()
def interpolate(
    model: LatentDiffusion,
    pictures: tuple[bytes, bytes],
    request: GenerateRequest,
    *,
    frames: int = 9,
    rows: Sequence[int | None] = (None,),
) -> Iterator[Progress | Picture]:
    """Draw `frames` pictures for each row, row by row, whose embeddings lie evenly on the arc between the two.

    rows: what the pictures of a row begin in: the noise of this seed, the same for all of them, or with None what lies
          on the arc between the noises of both pictures, so that the row begins and ends with the pictures themselves

    The second picture is brought to the shape of the first. The noise that an eta adds has the row's seed, or the
    request's. Raises `LdmError` for fewer than two frames, for no row, for opposite ends, and as `inverting` does.
    """
    shares = evenly(frames)
    if not rows:
        raise LdmError("rows: found none, expected a seed, or None for the noise of both pictures")
    request = sequence_request(model, request, pictures[0], inverts=None in rows)
    requests = [request if row is None else request.changed(seed=row) for row in rows]
    first, second = (model.image_embedding(picture) for picture in pictures)
    told = arc(first, second, shares, "embeddings of the two pictures")
    pairs = []
    for picture in pictures if None in rows else ():
        pairs.append((yield from inverting(model, picture, request)))
    between = arc(pairs[0].noise, pairs[1].noise, shares, "noises of the two pictures") if pairs else []
    drawn = [
        Frame(one, embedding, start)
        for one, row in zip(requests, rows, strict=True)
        for embedding, start in zip(told, between if row is None else [None] * frames, strict=True)
    ]
    yield from draw_frames(model, drawn)

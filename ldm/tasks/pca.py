"""Reconstructions from the first principal components of what CLIP sees (Ramesh et al. 2022, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.clip.components import Components, components_of
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.frames import Frame, draw_frames, sequence_request
from ldm.tasks.invert import inverting


@torch.inference_mode()
def pca(
    model: LatentDiffusion,
    pictures: Sequence[bytes],
    request: GenerateRequest,
    counts: Sequence[int | None],
    *,
    components: Components | None = None,
    inverted: bool = False,
) -> Iterator[Progress | Picture]:
    """Draw each picture from the first k components of its embedding, for every k of `counts`; None is all of it.

    components: None: those of the pictures themselves, at least two
    inverted:   begin in each picture's own noise; else, as in the paper, all begin in that of the request's seed

    What is left of an embedding is brought back to its length, which the decoder is used to. The size is that of the
    first picture. Raises `LdmError` where there are not so many components, for components of another width, and as
    `inverting` does.
    """
    if not pictures:
        raise LdmError("pictures: found none, expected one or more to take apart")
    request = sequence_request(model, request, pictures[0], inverts=inverted)
    embeddings = [model.image_embedding(picture) for picture in pictures]
    components = components or components_of(torch.cat(embeddings).float())
    _check(counts, components, embeddings[0].shape[1])
    drawn = []
    for picture, embedding in zip(pictures, embeddings, strict=True):
        start = (yield from inverting(model, picture, request)).noise if inverted else None
        drawn += [Frame(request, kept(embedding, count, components), start) for count in counts]
    yield from draw_frames(model, drawn)


def kept(embedding: Tensor, count: int | None, components: Components) -> Tensor:
    """An embedding (1, P) of which the first components are left, as long as it was; None: the embedding itself."""
    if count is None:
        return embedding
    left = components.first(embedding.float(), count)
    return (left * (embedding.float().norm() / left.norm().clamp(min=1e-12))).to(embedding)


def _check(counts: Sequence[int | None], components: Components, width: int) -> None:
    if len(components.mean) != width:
        raise LdmError(
            f"components: found some of {len(components.mean)} numbers, expected {width}, this model's embeddings; make"
            " them with this model"
        )
    most = len(components.components)
    if not counts:
        raise LdmError(f"components: found no number of them, expected some from 0 to {most}, or all")
    if wrong := [count for count in counts if count is not None and not 0 <= count <= most]:
        raise LdmError(
            f"components: found {wrong[0]}, expected 0 to {most}, as many as there are, or all; take them of more"
            " pictures for more"
        )

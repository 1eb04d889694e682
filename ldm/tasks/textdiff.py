"""Text diffs: a picture changed the way that one caption differs from another (Ramesh et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.text_encoder import OpenCLIPText
from ldm.pipeline.clip.model import clip_of
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.pipeline.validation import shown
from ldm.tasks.frames import Frame, arc, draw_frames, evenly, sequence_request
from ldm.tasks.invert import inverting
from ldm.weights.io import printable

TextVectors = Callable[[Sequence[str]], Tensor]
"""Texts -> unit vectors (N, P) in the space of a model's image embeddings; `CLIP.text_vectors` is one."""

SAME = 1e-6
"""Captions whose unit vectors lie closer than this say the same to CLIP."""


@torch.inference_mode()
def textdiff(
    model: LatentDiffusion,
    picture: bytes,
    request: GenerateRequest,
    source: str,
    target: str,
    *,
    frames: int = 7,
    theta: float = 0.5,
    text_vectors: TextVectors | None = None,
) -> Iterator[Progress | Picture]:
    """Draw the picture on its way from what `source` says to what `target` says, from the picture's own noise.

    With z the picture's embedding and d the direction of the difference of the two captions' vectors, frame j is told
    the point on the arc from z to d that lies at the share theta_j, which grows evenly from 0 to `theta`, above 0 and
    at most 1. The paper goes to 0.25 ... 0.5. text_vectors: None: `own_text_vectors`.

    Raises `LdmError` where the captions do not differ, for a theta or a number of frames that cannot be, and as
    `inverting` does.
    """
    if not 0 < theta <= 1:
        raise LdmError(f"theta: found {theta:g}, expected above 0 and at most 1; try 0.25 to 0.5")
    shares = evenly(frames, theta)
    request = sequence_request(model, request, picture, inverts=True)
    direction = text_direction(text_vectors or own_text_vectors(model), source, target)
    pair = yield from inverting(model, picture, request)
    goal = direction.to(pair.embedding) * pair.embedding.norm()
    told = arc(pair.embedding, goal, shares, "picture and change of caption")
    yield from draw_frames(model, [Frame(request, embedding, pair.noise) for embedding in told])


def text_direction(text_vectors: TextVectors, source: str, target: str) -> Tensor:
    """The unit vector (1, P) from one caption to another. Raises `LdmError` where they say the same."""
    before, after = text_vectors([source, target]).float()
    difference = after - before
    if float(difference.norm()) < SAME:
        raise LdmError(
            f"captions: found {shown(source)} and {shown(target)}, which say the same to CLIP, expected two that"
            " differ; say what is there, and what it should become"
        )
    return (difference / difference.norm())[None]


def own_text_vectors(model: LatentDiffusion) -> TextVectors:
    """Those of the model's own text tower, where it was trained together with its image tower.

    So it is in our decoder, and in SD 2.1 unCLIP with OpenCLIP's ViT-H. Raises `LdmError` for other models.
    """
    text, image = model.text[0] if model.text else None, model.image
    if image is None or not isinstance(text, OpenCLIPText) or text.config.projection != image.config.projection:
        name = printable(str(model.origin.path or "model"))
        raise LdmError(
            f"{name}: has no text tower in the space of its image embeddings, which text diffs need; use this package's"
            " decoder or SD 2.1 unCLIP-h in one file, or give text_vectors"
        )
    return clip_of(model.present(text), image, name=model.origin.name or "model", identity="", scale=1.0).text_vectors

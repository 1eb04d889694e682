"""Variations of a picture that begin in its own noise: eta says how far they go (Ramesh et al. 2022, section 3.1).

`ldm.tasks.variations` begins in other noise, so that nothing but what CLIP sees is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.prepare import resolve
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress, alone
from ldm.tasks.common import refuse
from ldm.tasks.frames import NOT_TAKEN, Frame, draw_frames, shaped_like
from ldm.tasks.invert import inverting


@torch.inference_mode()
def eta_variations(model: LatentDiffusion, request: GenerateRequest) -> Iterator[Progress | Picture]:
    """Draw `request.vary` again from its own pair (z, x_T), `request.count` times.

    With eta 0, guidance 1 and no prompt each is the picture; with eta up to 1 the steps add the more noise, picture i
    that of seed + i, and what the pair does not hold to differs. A prompt leads away from the picture as well.
    Raises `LdmError` as `inverting` and `ldm.pipeline.sample.run` do.
    """
    if request.vary is None:
        raise LdmError("vary: found none, expected a picture to vary; give vary, as `ldm variations` does")
    refuse(request, NOT_TAKEN, "vary_inverted")
    picture = request.vary
    request = resolve(model, shaped_like(model, request, picture))
    plain = request.changed(count=1, vary=None, vary_noise=0, vary_inverted=False)
    pair = yield from inverting(model, picture, plain)
    frames = [Frame(alone(request, index), pair.embedding, pair.noise) for index in range(request.count)]
    yield from draw_frames(model, frames, notes=())

"""What a prior is good for: the same prompts drawn without one, in spite of one, and with one.

Ramesh et al. 2022, section 5.1 and figure 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.clip.prior import imagined, tell_words
from ldm.pipeline.clip.unclip import as_told
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest, PriorUse
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.frames import Frame, draw_frames, sequence_request

COLUMNS = ("text alone", "text's vector", "prior")
"""What each of the three is told."""


@torch.inference_mode()
def side_by_side(
    model: LatentDiffusion, prompts: Sequence[str], request: GenerateRequest
) -> Iterator[Progress | Picture]:
    """Draw each prompt three times from the same noise, told the prompt and

        nothing more;  the text's own vector, as if it were a picture's;  the embedding that the prior made of the text

    model: with a prior, which is asked as `request.prior` says, None: as usual. Prompt i has the noise of seed + i, and
    the third picture is the one that it draws alone. Raises `LdmError` where there is no prompt, where the model has no
    prior, and as `ldm.tasks.frames.draw_frames` does.
    """
    if model.prior is None:
        raise LdmError("prior: found none, expected one to compare with; give it by --prior, or by with_prior")
    if not prompts:
        raise LdmError("prompts: found none, expected some to draw")
    use = request.prior or PriorUse()
    plain = sequence_request(model, request.changed(prior=None), None, inverts=False)
    assert plain.seed is not None
    drawn = []
    for index, prompt in enumerate(prompts):
        one = plain.changed(prompt=prompt, seed=plain.seed + index)
        for embedding in (None, text_vector(model, one), imagined(model, prompt, one.changed(prior=use))):
            drawn.append(Frame(one, embedding))
    yield from draw_frames(model, drawn)


def text_vector(model: LatentDiffusion, request: GenerateRequest) -> Tensor:
    """CLIP's vector of the prompt's plain words, (1, P), as if it were what CLIP sees in a picture."""
    ((cond, _),) = tell_words(model, request.prompt, request.emphasis).parts
    assert cond.vector is not None
    return as_told(model, cond.vector.to(model.device))

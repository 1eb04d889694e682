"""What a prior is good for: the same prompts drawn without one, in spite of one, and with one.

Ramesh et al. 2022, section 5.1 and figure 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.sample import Picture, Progress
from ldm.tasks.frames import Frame, draw_frames, sequence_request


@torch.inference_mode()
def side_by_side(
    model: LatentDiffusion, prompts: Sequence[str], request: GenerateRequest, texts: Tensor, priors: Tensor
) -> Iterator[Progress | Picture]:
    """Draw each prompt three times from the same noise, told the prompt and

        nothing more;  the text's own vector, as if it were a picture's;  the embedding that a prior made of the text

    texts, priors: (N, P), a row for each prompt, in the scale of `LatentDiffusion.image_embedding` (to that of our
    decoder `ldm.pipeline.unclip.in_scale` brings them); prompt i has the noise of seed + i. Raises `LdmError` for
    another number of rows, and as `ldm.tasks.frames.draw_frames` does.
    """
    if not len(prompts) == len(texts) == len(priors) > 0:
        raise LdmError(
            f"embeddings: found {len(texts)} of texts and {len(priors)} of a prior for {len(prompts)} prompts, expected"
            " one of each for every prompt"
        )
    request = sequence_request(model, request, None, inverts=False)
    assert request.seed is not None
    drawn = [
        Frame(request.changed(prompt=prompt, seed=request.seed + index), embedding)
        for index, prompt in enumerate(prompts)
        for embedding in (None, texts[index : index + 1], priors[index : index + 1])
    ]
    yield from draw_frames(model, drawn)

"""What the text towers say of a batch of captions, with gradients: to the towers, or to the vectors of new words.

The same parts as at generation, but many captions at once. Brackets are text: captions have no weights.
Shapes: B captions, T towers, C chunks, N = 77 places of a chunk, D text width, P width of all pooled states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.models.text_encoder import TextStates
from ldm.models.tokenizer import framed
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.text.embeddings import words_of
from ldm.pipeline.text.emphasis import MAX_CHUNKS, token_chunks
from ldm.pipeline.text.states import side_by_side


def caption_ids(model: LatentDiffusion, captions: Sequence[str], chunks: int = 1) -> Tensor:
    """Captions -> what the towers look up, (B, T, C, N) int64 on the CPU; names of `model.embeddings` are found.

    C is what the longest caption takes, at least `chunks` and at most `MAX_CHUNKS`: behind that captions are cut. The
    others are filled up with chunks that say nothing.
    """
    rows = []
    for index, use in enumerate(model.config.text):
        room = use.tower.tokens - 2
        words, _ = words_of(model.embeddings, index, use.tower.vocabulary)
        texts = [token_chunks(caption, room, words, "literal")[:MAX_CHUNKS] for caption in captions]
        count = max(chunks, *map(len, texts))
        filled = [[*text, *([()] * (count - len(text)))] for text in texts]
        rows.append([
            [framed([token.id for token in chunk], use.tower.tokens, use.padding) for chunk in text] for text in filled
        ])  # fmt: skip
    return torch.tensor(rows).transpose(0, 1).contiguous()


def text_states(model: LatentDiffusion, ids: Tensor) -> TextStates:
    """ids (B, T, C, N) on the towers' device -> states (B, C * N, D) and pooled (B, P) or None, with gradients.

    They are what `model.encode_prompt` tells of each caption, taken literally; `ldm.pipeline.text.states.told` makes a
    `Conditioning` of them. With gradients: call it under `torch.no_grad()` where none are wanted.
    """
    rows, _, chunks, places = ids.shape
    said = []
    for index, (tower, use) in enumerate(zip(model.text, model.config.text, strict=True)):
        _, vectors = words_of(model.embeddings, index, use.tower.vocabulary)
        encoded = tower(ids[:, index].reshape(-1, places), use.skip, use.final_norm, use.pooled, vectors)
        first = None if encoded.pooled is None else encoded.pooled.reshape(rows, chunks, -1)[:, 0]
        said.append(TextStates(encoded.states.reshape(rows, chunks * places, -1), first))
    return side_by_side(said)

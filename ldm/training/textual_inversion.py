"""Textual inversion: a few vectors for a word of its own, the only numbers that are trained (Gal et al. 2022).

The vectors stand in captions as they will stand in prompts: a model `with_embeddings([word.live()])` finds the word,
and what its towers say has gradients to the vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.text_encoder import CLIPText, OpenCLIPText
from ldm.models.tokenizer import word_ids
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.weights.embeddings import MAX_VECTORS, Embedding
from ldm.weights.io import printable


class NewWord(nn.Module):
    """A word and its vectors, (n, D) float32 for each text tower. Tensor names: vectors.N."""

    def __init__(self, name: str, vectors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.name = name
        self.vectors = nn.ParameterList(nn.Parameter(tower.detach().float().clone()) for tower in vectors)

    def live(self) -> Embedding:
        """The embedding with the parameters themselves: it changes as they do, and passes gradients to them."""
        return Embedding(self.name, tuple(self.vectors), "")

    def embedding(self, steps: int | None = None, base: str | None = None) -> Embedding:
        """The embedding as it is now, to be written. steps: trained so far; base: the name of the model."""
        vectors = tuple(tower.detach().float().cpu().clone() for tower in self.vectors)
        return Embedding(self.name, vectors, "", steps=steps, base=base)


def new_word(model: LatentDiffusion, name: str, count: int, start: str) -> NewWord:
    """A word of `count` vectors for all towers of a model, each at first that of a token of `start`.

    Of fewer tokens than vectors each stands for several in a row; of more, some are left out. Where `start` is empty,
    each begins as the mean of all that the tower knows. Raises LdmError where `start` says nothing otherwise, `count`
    is not 1 to `MAX_VECTORS`, the name is empty or the model has no text towers.
    """
    if not model.text:
        raise LdmError("embedding: this model has no text towers, so prompts have no words; use another one")
    if not 1 <= count <= MAX_VECTORS:
        raise LdmError(f"embedding {printable(name)}: has {count} vectors, expected 1 to {MAX_VECTORS}")
    ids = word_ids(start)
    if start and not ids:
        raise LdmError(f"embedding {printable(name)}: begins as {start!r}, expected a word; give one that is like it")
    chosen = torch.tensor([ids[i * len(ids) // count] for i in range(count)]) if ids else None
    word = NewWord(name, tuple(_first_vectors(_table(tower).weight, chosen, count) for tower in model.text))
    model.with_embeddings([word.live()])  # which raises for a name that is no word
    return word


def _first_vectors(table: Tensor, chosen: Tensor | None, count: int) -> Tensor:
    """(count, D): the rows that are chosen, or the mean of all."""
    if chosen is None:
        return table.float().mean(dim=0).expand(count, -1)
    return table[chosen.to(table.device)]


def _table(tower: object) -> nn.Embedding:
    """The vectors of all known tokens."""
    assert isinstance(tower, OpenCLIPText | CLIPText)
    return tower.token_embedding if isinstance(tower, OpenCLIPText) else tower.text_model.embeddings.token_embedding

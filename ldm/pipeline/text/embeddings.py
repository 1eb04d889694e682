"""Embeddings in a model: whether they fit its text towers, and what these look up for their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import TEXT_WIDTHS, SystemConfig
from ldm.models.tokenizer import split_at_names
from ldm.weights.embeddings import Embedding
from ldm.weights.io import printable


def fitted(embeddings: Iterable[Embedding], config: SystemConfig) -> tuple[Embedding, ...]:
    """The embeddings, each with one tensor of vectors for every text tower of the system.

    Raises LdmError where one is of another width, its name is no word, or two have the same name.
    """
    widths = tuple(use.tower.width for use in config.text)
    fit: dict[str, Embedding] = {}
    for embedding in embeddings:
        ((key, _),) = split_at_names(embedding.name, ())
        shown = f"embedding {printable(embedding.name)}"
        if not key:
            raise LdmError(f"{shown}: its name is empty; give its file another name")
        if key in fit:
            raise LdmError(f"{shown}: there is another of this name (capitals do not count); leave one away")
        if config.family == "sdxl-refiner" and len(embedding.vectors) == 2:
            embedding = replace(embedding, vectors=embedding.vectors[1:])  # it has the second tower of SDXL
        if embedding.widths != widths:
            wanted = (
                f"{TEXT_WIDTHS.get(sum(widths), config.family)} (text {' and '.join(map(str, widths)) or 'none'} wide)"
            )
            raise LdmError(f"{shown}: is for {embedding.made_for}, this model is {wanted}; use one made for that")
        fit[key] = embedding
    return tuple(fit.values())


def words_of(embeddings: Sequence[Embedding], tower: int, vocabulary: int) -> tuple[dict[str, range], Tensor | None]:
    """For one text tower: name -> the ids that stand for it, all above the vocabulary, and the vectors of these ids."""
    words, first = {}, vocabulary
    for embedding in embeddings:
        words[embedding.name] = range(first, first + embedding.places)
        first += embedding.places
    return words, torch.cat([embedding.vectors[tower] for embedding in embeddings]) if embeddings else None


def used_in(embeddings: Sequence[Embedding], *texts: str) -> tuple[Embedding, ...]:
    """Those whose name is in one of the texts."""
    names = [embedding.name for embedding in embeddings]
    found = {name for text in texts for _, name in split_at_names(text, names)}
    return tuple(embedding for embedding in embeddings if embedding.name in found)

"""From a prompt to text states: weighted tokens, chunks as long as a tower takes them, and what the weights do.

A prompt of any length is cut into chunks, each is encoded by itself with its own start and end token, and their states
are put one behind the other; cross-attention does not mind how many there are.
Shapes: N = 77 places of a chunk, C chunks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.models.presets import TextUse
from ldm.models.text_encoder import TextStates, TextTower
from ldm.models.tokenizer import COMMA, NO_WORDS, framed, word_groups, word_ids
from ldm.pipeline.text.prompt import Emphasis
from ldm.pipeline.text.prompt_weights import Piece, parse_weights

MAX_CHUNKS = 16
"""What stands behind so many chunks is cut: `LatentDiffusion.words_cut` names it."""

BACKTRACK = 20
"""A chunk may end so many places early, behind a comma, so that what follows the comma stays together."""

LARGE_WORD = 8
"""ComfyUI divides a word among chunks only where it has so many tokens."""


class Token(NamedTuple):
    """An id, its weight, and which piece it is from, counted from the last BREAK."""

    id: int
    weight: float = 1.0
    piece: int = 0


TokenChunk = Sequence[Token]
"""What one chunk holds between its start and its end: no more than there is room."""


def token_chunks(
    prompt: str, room: int, words: Mapping[str, Sequence[int]] = NO_WORDS, emphasis: Emphasis = "a1111"
) -> list[TokenChunk]:
    """A prompt without scheduling -> at least one chunk of at most `room` tokens.

    AUTOMATIC1111's rules: a chunk that is full goes on to the next behind its last comma, if that is not more than
    `BACKTRACK` places back; the vectors of an embedding stay together; BREAK ends a chunk. With "comfy" ComfyUI's: a
    word stays together, commas do not count. words: of embeddings, see `ldm.models.tokenizer.word_ids`
    """
    chunks: list[TokenChunk] = []
    for pieces in parse_weights(prompt, emphasis):
        groups = (
            tuple(Token(id_, 1.0 if emphasis == "ignore" else piece.weight, index) for id_ in ids)
            for index, piece in enumerate(pieces)
            for ids in _groups(piece, room, words, emphasis)
        )
        chunks += _filled(groups, room, 0 if emphasis == "comfy" else BACKTRACK)
    return chunks


def _groups(piece: Piece, room: int, words: Mapping[str, Sequence[int]], emphasis: Emphasis) -> Iterator[Sequence[int]]:
    """The ids of a piece, in groups that are to stay in one chunk."""
    comfy = emphasis == "comfy"
    longest = min(room, LARGE_WORD - 1) if comfy else room
    for ids in (word_ids(word, words) for word in piece.text.split()) if comfy else word_groups(piece.text, words):
        yield from [ids] if len(ids) <= longest else ([id_] for id_ in ids)


def _filled(groups: Iterable[Sequence[Token]], room: int, backtrack: int) -> list[TokenChunk]:
    """Groups of at most `room` tokens, one behind the other, in chunks."""
    chunks: list[TokenChunk] = []
    chunk: list[Token] = []
    comma: int | None = None  # the place of the chunk's last comma
    for group in groups:
        if len(group) == 1 and group[0].id == COMMA:
            comma = len(chunk)
        elif len(chunk) == room and comma is not None and room - comma <= backtrack:
            chunks.append(chunk[: comma + 1])
            chunk, comma = chunk[comma + 1 :], None
        if len(chunk) + len(group) > room:
            chunks.append(chunk)
            chunk, comma = [], None
        chunk.extend(group)
    return [*chunks, chunk]


def encode_chunks(
    chunks: Sequence[TokenChunk],
    tower: TextTower,
    use: TextUse,
    skip: int,
    vectors: Tensor | None = None,
    emphasis: Emphasis = "a1111",
    device: torch.device | str = "cpu",
) -> TextStates:
    """Chunks -> states (1, C * N, D), and the first chunk's pooled state, which knows no weights.

    skip, vectors: of the tower. Every chunk goes through it alone, so that a prompt which is a chunk longer has the
    same states in its first chunk, bit for bit.
    """

    def run(chunk: TokenChunk, pooled: bool = False) -> TextStates:
        ids = framed([token.id for token in chunk], use.tower.tokens, use.padding)
        return tower(torch.tensor([ids], device=device), skip, use.final_norm, pooled, vectors)

    def weights_of(chunk: TokenChunk) -> Tensor:
        weights = [1.0, *(token.weight for token in chunk)]
        weights += [1.0] * (use.tower.tokens - len(weights))
        return torch.tensor(weights, device=device)[:, None]

    def states_of(chunk: TokenChunk) -> Tensor:
        return run(chunk).states.float()

    encoded = [run(chunk, pooled=use.pooled and index == 0) for index, chunk in enumerate(chunks)]
    states = []
    for chunk, one in zip(chunks, encoded, strict=True):
        plain = one.states
        if any(token.weight != 1 for token in chunk):
            if emphasis == "compel":
                weighted = _compel(chunk, states_of, weights_of)
            elif emphasis == "comfy":
                weighted = _from_empty(plain.float(), states_of([]), weights_of(chunk))
            else:
                weighted = _multiplied(plain.float(), weights_of(chunk), restore_mean=emphasis == "a1111")
            plain = weighted.to(plain.dtype)
        states.append(plain)
    return TextStates(torch.cat(states, dim=1), encoded[0].pooled)


def _multiplied(states: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """AUTOMATIC1111's: states (1, N, D) by weights (N, 1); then scaled so that the mean of all numbers is as it was."""
    weighted = states * weights
    return weighted * (states.mean() / weighted.mean()) if restore_mean else weighted


def _from_empty(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """ComfyUI's: away from the states of the empty prompt (weights above 1), or towards them (below 1)."""
    return torch.where(weights == 1, states, empty + (states - empty) * weights)


def _compel(
    chunk: TokenChunk, states_of: Callable[[TokenChunk], Tensor], weights_of: Callable[[TokenChunk], Tensor]
) -> Tensor:
    """compel's: as `_from_empty`; and for each piece below 1, a share of the chunk without that piece.

    The shares are tan((1 - w) pi/2) against 1, so that a half is half-way and 0 is without. "Without" means taken out,
    compel's `DownweightMode.REMOVE`; its default masks the piece in the tower's attention instead, which pictures made
    with it will show. compel cuts a prompt off behind its first chunk or, on demand, divides it by rules of its own.
    """
    empty = states_of([])
    blend, shares = _from_empty(states_of(chunk), empty, weights_of(chunk)), 1.0
    for piece, weight in {token.piece: token.weight for token in chunk if token.weight < 1}.items():
        rest = [token for token in chunk if token.piece != piece]
        share = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
        blend = blend + share * _from_empty(states_of(rest), empty, weights_of(rest))
        shares += share
    return blend / shares

"""What the priors are trained on: CLIP's embeddings of all pictures, and what its text tower says of their captions.

Both lie where `ldm.training.latents` and the decoder's stage put them. N pictures, M captions, P width of CLIP's space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.records import Record
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.presets import TextUse
from ldm.models.prior import Prior
from ldm.models.tokenizer import tokenize
from ldm.pipeline.clip.components import Components
from ldm.pipeline.clip.prior import text_lengths
from ldm.pipeline.clip.unclip import in_scale
from ldm.training.diffusion import LatentPictures
from ldm.training.whitening import TextWhitening, Whitening, whitening_of
from ldm.types import Conditioning

FLOOR = 1e-3
"""The least deviation or range of a coordinate: one that never changes is not scaled up."""


@dataclass(frozen=True)
class PriorPictures:
    """Pictures and captions as a prior is shown them.

    embeddings: (N, 2, P) of length sqrt(P), of each picture and of it mirrored; flips (N,): may it be mirrored
    states (M, tokens, width), pooled (M, P) of any length: of the captions, the last row of no caption
    lengths: (M,) how many tokens of each caption are no padding
    first: first[i] .. first[i + 1] are the rows that describe picture i
    whitening: what is done to the states and to the vectors of length sqrt(P) before the network sees them, and put
    into its weights afterwards
    """

    embeddings: np.ndarray
    flips: np.ndarray
    states: np.ndarray
    pooled: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    whitening: TextWhitening

    def vectors(self, rows: Sequence[int]) -> Tensor:
        """The text vectors of some captions, (B, P) of length sqrt(P)."""
        return in_scale(torch.from_numpy(np.asarray(self.pooled[list(rows)], dtype=np.float32)))

    def told(self, rows: Sequence[int]) -> Conditioning:
        """What a prior is told of some captions, not white; padding that all of them have is left away."""
        lengths = torch.from_numpy(self.lengths[list(rows)])
        longest = int(lengths.max())
        states = np.stack([self.states[row, :longest] for row in rows]).astype(np.float32)
        words = torch.arange(longest)[None] < lengths[:, None]
        return Conditioning(cross=torch.from_numpy(states), vector=self.vectors(rows), words=words)

    def white(self, cond: Conditioning) -> Conditioning:
        """The same, white: what the network learns from."""
        assert cond.cross is not None and cond.vector is not None
        return cond.with_(cross=self.whitening.states(cond.cross), vector=self.whitening.pooled(cond.vector))


def prior_pictures(data: LatentPictures, embeddings: np.ndarray, lengths: np.ndarray) -> PriorPictures:
    """The encoded pictures and captions, with embeddings and lengths as in `PriorPictures`."""
    vectors = whitening_of(in_scale(torch.from_numpy(data.pooled).float()))
    whitening = TextWhitening(data.whitening.states, vectors)
    return PriorPictures(embeddings, data.flips, data.states, data.pooled, lengths, data.first, whitening)


def caption_lengths(use: TextUse, records: Sequence[Record]) -> np.ndarray:
    """How many tokens of each caption, in the order of `ldm.training.latents`, are no padding, (M,)."""
    texts = [*(text for record in records for text in record["texts"]), ""]
    ids = torch.tensor([tokenize(text, use.tower.tokens, use.padding) for text in texts])
    return text_lengths(ids).numpy()


def set_statistics(prior: Prior, embeddings: Tensor) -> None:
    """Tell a diffusion prior the mean and deviation of the embeddings (N, P) that it will be trained on."""
    prior.data_mean.copy_(embeddings.mean(dim=0))
    prior.data_std.copy_(embeddings.std(dim=0).clamp(min=FLOOR))


def kept_components(variances: Tensor, share: float) -> int:
    """How many of the largest variances (K,), which fall, add up to at least this share of all."""
    cumulative = variances.double().cumsum(dim=0) / variances.double().sum()
    return min(int((cumulative < share).sum()) + 1, len(variances))


def set_speller(prior: AutoregressivePrior, found: Components, embeddings: Tensor, texts: Tensor) -> None:
    """Tell an autoregressive prior how to spell: by the components of embeddings (N, P), and a text vector of each.

    Similarities are divided so that each bucket has the same share of these pairs.
    """
    kept = found.components[: prior.codes.components]
    along = (embeddings - found.mean) @ kept.T
    low, high = along.amin(dim=0), along.amax(dim=0)
    likeness = F.cosine_similarity(texts, embeddings, dim=-1)
    shares = torch.arange(1, prior.codes.similarities) / prior.codes.similarities
    speller = prior.speller
    speller.mean.copy_(found.mean)
    speller.directions.copy_(kept)
    speller.low.copy_(low)
    speller.high.copy_(torch.maximum(high, low + FLOOR))
    speller.edges.copy_(torch.quantile(likeness, shares))


@torch.no_grad()
def fold_text(prior: Prior | AutoregressivePrior, whitening: TextWhitening) -> None:
    """Turn a prior that was trained on white text into the same one on plain text, in place, exactly."""
    for layer, white in ((prior.reader.text_in, whitening.states), (prior.reader.vector_in, whitening.pooled)):
        _fold(layer, white)


def _fold(layer: nn.Linear, white: Whitening) -> None:
    white = white.to(layer.weight)
    layer.weight.copy_(layer.weight @ white.matrix)
    layer.bias.sub_(layer.weight @ white.mean)

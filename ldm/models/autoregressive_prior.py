"""The autoregressive prior of DALL-E 2: a picture's CLIP embedding spelled out, code by code, from what a text says.

Ramesh et al. 2022, section 2.2. The embedding's principal components, largest first, are rounded to the middle of one
of V buckets each. The transformer of `ldm.models.prior` reads

    the text's tokens | its CLIP vector | how alike text and picture are | code 1 | code 2 | ...

and says at each of the last ones what the code after it may be. The similarity is the product of the two CLIP vectors,
also in buckets, of which each has the same share of the training set: asked for one of the upper half, the prior spells
pictures that fit their text.

Shapes: as in `ldm.models.prior`; K components, V buckets, S buckets of similarity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.prior import Codes, PriorConfig, TextReader
from ldm.types import Conditioning


class Speller(nn.Module):
    """Embeddings -> codes and back, and similarities -> their buckets. It learns nothing; its statistics are set.

    Tensor names: mean (P,), directions (K, P) orthonormal, low and high (K,) the range of each component, edges
    (S - 1,) between the similarities, rising.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor
    edges: Tensor

    def __init__(self, codes: Codes, projection: int) -> None:
        super().__init__()
        self.buckets = codes.buckets
        self.register_buffer("mean", torch.zeros(projection))
        self.register_buffer("directions", torch.eye(codes.components, projection))
        self.register_buffer("low", torch.full((codes.components,), -1.0))
        self.register_buffer("high", torch.ones(codes.components))
        self.register_buffer("edges", torch.linspace(-1, 1, codes.similarities + 1)[1:-1])

    def encode(self, embedding: Tensor) -> Tensor:
        """(B, P) -> codes (B, K) int64 in 0..V-1; what lies outside the range gets the code at its end."""
        share = ((embedding - self.mean) @ self.directions.T - self.low) / (self.high - self.low)
        return (share * self.buckets).floor().long().clamp(0, self.buckets - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K) -> (B, P): every component in the middle of its bucket, what was not kept at its mean."""
        share = (codes.to(self.low) + 0.5) / self.buckets
        return (self.low + share * (self.high - self.low)) @ self.directions + self.mean

    def similarity(self, text: Tensor, embedding: Tensor) -> Tensor:
        """The bucket (B,) int64 in 0..S-1 of the cosine of text and picture, both (B, P)."""
        return torch.bucketize(F.cosine_similarity(text, embedding, dim=-1), self.edges)


class AutoregressivePrior(nn.Module):
    """Logits of each code, given the text, the similarity and the codes before it.

    Tensor names: reader, code_embedding, similarity_embedding (its last row is of no text), out, speller.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        codes = config.codes
        assert codes is not None
        self.config, self.codes = config, codes
        self.reader = TextReader(config, behind=codes.components)
        self.code_embedding = nn.Embedding(codes.buckets, config.width)
        self.similarity_embedding = nn.Embedding(codes.similarities + 1, config.width)
        self.out = nn.Linear(config.width, codes.buckets)
        self.speller = Speller(codes, config.projection)

    def forward(self, codes: Tensor, similarity: Tensor, cond: Conditioning) -> Tensor:
        """The first n codes (B, n), n < K, and the similarity's bucket (B,), S for none -> logits (B, n + 1, V)."""
        behind = torch.cat([self.similarity_embedding(similarity)[:, None], self.code_embedding(codes)], dim=1)
        return self.out(self.reader(cond, behind))

"""The prior of DALL-E 2: what a text says -> the CLIP embedding of a picture that it may describe.

Ramesh et al. 2022, section 2.2. A causal transformer reads, in this order,

    the text's tokens | its CLIP vector | the timestep | the noised embedding | a token of its own, the query

and says at the query what the embedding is without noise. Padding among the text's tokens is looked at by none.
Embeddings have the length sqrt(P); the network sees them with mean 0 and deviation 1 in each coordinate.

Shapes: B batch, N text tokens, E tokens behind the text, D width, P width of the space that CLIP's texts and pictures
share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.layers.embeddings import sinusoidal_embedding
from ldm.models.text_encoder import OpenCLIPTransformer
from ldm.types import Conditioning


@dataclass(frozen=True)
class Codes:
    """How the autoregressive prior spells an embedding, see `ldm.models.autoregressive_prior`.

    components: K, how many principal components are kept; buckets: V, into how many each is divided;
    similarities: S, into how many the similarity of text and picture is.
    """

    components: int
    buckets: int = 1024
    similarities: int = 32


@dataclass(frozen=True)
class PriorConfig:
    """A prior's sizes, and the CLIP that it was trained for.

    projection: P; text_width: of the text states; tokens: the longest N; width: D
    schedule: a key of `ldm.diffusion.schedule.NOISE_SCHEDULES`
    codes: of an autoregressive prior; None: it is a diffusion prior
    clip: the first numbers of the text projection of the CLIP, by which it is known again; empty: not known
    """

    projection: int = 192
    text_width: int = 192
    tokens: int = 77
    width: int = 256
    layers: int = 6
    heads: int = 8
    schedule: str = "cosine"
    codes: Codes | None = None
    clip: tuple[float, ...] = ()


class TextReader(nn.Module):
    """What both priors share: the transformer, with a text in front of whatever they read.

    Tensor names: text_in, vector_in, positional_embedding, transformer.resblocks, ln_final. The positions are those of
    the longest text, then of its vector, then of the tokens behind it.
    """

    def __init__(self, config: PriorConfig, behind: int) -> None:
        """behind: the largest E."""
        super().__init__()
        self.config = config
        self.text_in = nn.Linear(config.text_width, config.width)
        self.vector_in = nn.Linear(config.projection, config.width)
        self.positional_embedding = nn.Parameter(
            torch.empty(config.tokens + 1 + behind, config.width).normal_(std=0.01)
        )
        self.transformer = OpenCLIPTransformer(config.width, config.layers, config.heads, "gelu", causal=True)
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, cond: Conditioning, behind: Tensor) -> Tensor:
        """behind (B, E, D) -> what became of these tokens, (B, E, D).

        cond: `cross` (B, N, text_width) the text's states, `vector` (B, P) its CLIP vector of length sqrt(P), `words`
        (B, N) which of its tokens are no padding, None: all.
        """
        text, vector = cond.cross, cond.vector
        assert text is not None and vector is not None, "a prior needs the states of a text and its vector"
        count, room = text.shape[1], self.config.tokens
        places = self.positional_embedding[room : room + 1 + behind.shape[1]]
        places = torch.cat([self.positional_embedding[:count], places])
        x = torch.cat([self.text_in(text), self.vector_in(vector)[:, None], behind], dim=1) + places
        seen = None
        if cond.words is not None:
            seen = torch.cat([cond.words, cond.words.new_ones(len(x), x.shape[1] - count)], dim=1)
        for block in self.transformer.resblocks:
            x = block(x, seen)
        return self.ln_final(x[:, count + 1 :])


class Prior(nn.Module):
    """The diffusion prior: a `Network` over embeddings whose answer is the clean embedding (x0).

    Tensor names: reader, time_embed.0, time_embed.2, image_in, query, out, data_mean, data_std; the last two (P,), of
    the embeddings that it was trained on.
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        assert config.codes is None
        self.config = config
        width = config.width
        self.reader = TextReader(config, behind=3)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.image_in = nn.Linear(config.projection, width)
        self.query = nn.Parameter(torch.empty(width).normal_(std=0.01))
        self.out = nn.Linear(width, config.projection)
        self.register_buffer("data_mean", torch.zeros(config.projection))
        self.register_buffer("data_std", torch.ones(config.projection))

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """x (B, P) of unit variance, timestep (B,), cond as `TextReader` takes it -> x0 (B, P)."""
        time = self.time_embed(sinusoidal_embedding(timestep, self.config.width).to(x))
        query = self.query.expand(len(x), -1)
        behind = torch.stack([time, self.image_in(x), query.to(time)], dim=1)
        return self.out(self.reader(cond, behind)[:, -1])

    def to_unit(self, embedding: Tensor) -> Tensor:
        """Embeddings (B, P) of length sqrt(P) -> x0 (B, P), as the network knows them."""
        return (embedding - self.data_mean) / self.data_std

    def from_unit(self, x0: Tensor) -> Tensor:
        """The inverse of `to_unit`. What was sampled has not quite the length sqrt(P)."""
        return x0 * self.data_std + self.data_mean

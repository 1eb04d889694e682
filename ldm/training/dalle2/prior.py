"""The objectives of the two priors: from a caption to the CLIP embedding of its picture.

Ramesh et al. 2022, section 2.2; Ho & Salimans 2022 (dropped captions). Both see captions whitened and are folded
afterwards, see `ldm.training.whitening`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Told
from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.diffusion.state import noised
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.prior import Prior
from ldm.pipeline.clip.prior import image_embeddings
from ldm.training.dalle2.prior_data import PriorPictures, fold_text
from ldm.training.dalle2.prior_retrieval import recall
from ldm.training.draws import NO_CAPTION, Drawn, Draws, draws_from
from ldm.training.engine.objective import Batch, Draw, Objective
from ldm.types import Conditioning

PREVIEWED = 256
"""How many held-out captions are asked for embeddings when a prior looks at itself."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """What both objectives draw from: the pictures, those held out, and how likely a caption is left out."""

    data: PriorPictures
    draws: Draws
    held_out: list[int]
    drop: float

    def __call__(self, draw: Draw) -> Batch:
        """embedding (B, P), what is told of it (see `_told`), plain: its text's vector, dropped: whether it has none.

        One caption of each picture, and the picture as it is or mirrored.
        """
        return self._batch(self.draws.told(self.draws.pictures(draw.count, draw.generator), draw.generator, self.drop))

    def aside(self) -> Batch:
        """The same of the pictures held out, each as it is, with its first caption."""
        captions = self.first_captions()
        return self._batch(Drawn(np.array(self.held_out), np.zeros(len(captions), bool), captions, captions))

    def first_captions(self) -> np.ndarray:
        """Of the pictures held out, by row."""
        return self.data.first[self.held_out]

    def _batch(self, drawn: Drawn) -> Batch:
        cond = self.data.white(self.data.told(drawn.rows.tolist()))
        assert cond.cross is not None and cond.vector is not None and cond.words is not None
        return {
            "embedding": torch.from_numpy(self.data.embeddings[drawn.pictures, drawn.mirrored.astype(int)]).float(),
            "states": cond.cross,
            "vector": cond.vector,
            "words": cond.words,
            "plain": self.data.vectors(drawn.captions.tolist()),
            "dropped": torch.from_numpy(drawn.rows == NO_CAPTION),
        }


def pairs_from(data: PriorPictures, held_out: Sequence[int], share: np.ndarray | None, drop: float) -> Pairs:
    """share: how likely each picture is drawn, None: all alike; those held out never are."""
    return Pairs(data, draws_from(data.flips, data.first, held_out, share), list(held_out), drop)


def _told(batch: Batch) -> Conditioning:
    return Conditioning(cross=batch["states"], vector=batch["vector"], words=batch["words"])


class PriorObjective(Objective):
    """The squared error of the clean embedding, all timesteps alike (eq. 2), through the Denoiser that samplers use."""

    def __init__(
        self,
        prior: Prior,
        data: PriorPictures,
        held_out: Sequence[int],
        *,
        share: np.ndarray | None = None,
        drop: float = 0.1,
    ) -> None:
        """The prior knows its statistics (`set_statistics`); the rest is as `pairs_from` says."""
        super().__init__()
        self.prior, self.pairs = prior, pairs_from(data, held_out, share, drop)
        self.denoiser = Denoiser(prior, NOISE_SCHEDULES[prior.config.schedule](), "x0")

    def batch(self, draw: Draw) -> Batch:
        """What `Pairs` gives, noise (B, P) and timestep (B,)."""
        return self._noised(self.pairs(draw), draw.generator)

    def _noised(self, batch: Batch, generator: torch.Generator) -> Batch:
        shape = batch["embedding"].shape
        timestep = torch.randint(len(self.denoiser.schedule), shape[:1], generator=generator)
        return batch | {"noise": torch.randn(shape, generator=generator), "timestep": timestep}

    def forward(self, batch: Batch) -> Batch:
        """-> loss."""
        x0 = self.prior.to_unit(batch["embedding"])
        sigma = self.denoiser.schedule.sigma(batch["timestep"])
        output, _ = self.denoiser.output(noised(x0, batch["noise"], sigma), sigma, _told(batch))
        return {"loss": (output.float() - x0).square().mean()}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """On held-out pictures: the loss, and how often what the prior makes of a caption is nearest its own picture.

        The noise is the same every time.
        """
        generator = torch.Generator().manual_seed(1)
        batch = self._noised(self.pairs.aside(), generator)
        return {"held_out": _loss(self, batch), "recall@1": _recall(self.prior, self.pairs, steps=10)}


class CodesObjective(Objective):
    """The cross entropy of each code, given the text, the similarity and the codes before it."""

    def __init__(
        self,
        prior: AutoregressivePrior,
        data: PriorPictures,
        held_out: Sequence[int],
        *,
        share: np.ndarray | None = None,
        drop: float = 0.1,
    ) -> None:
        """The prior knows how to spell (`set_speller`); the rest is as `pairs_from` says."""
        super().__init__()
        self.prior, self.pairs = prior, pairs_from(data, held_out, share, drop)

    def batch(self, draw: Draw) -> Batch:
        """What `Pairs` gives, and which codes and similarity that is, (B, K) and (B,)."""
        return self._spelled(self.pairs(draw))

    def _spelled(self, batch: Batch) -> Batch:
        speller = self.prior.speller
        embedding, plain = batch["embedding"].to(speller.mean), batch["plain"].to(speller.mean)
        similarity = speller.similarity(plain, embedding).cpu()
        similarity = similarity.masked_fill(batch["dropped"], self.prior.codes.similarities)
        return batch | {"codes": speller.encode(embedding).cpu(), "similarity": similarity}

    def forward(self, batch: Batch) -> Batch:
        """-> loss, in nats a code."""
        codes = batch["codes"]
        logits = self.prior(codes[:, :-1], batch["similarity"], _told(batch))
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """As `PriorObjective.evaluate`, but of fewer captions: spelling takes a step a code."""
        batch = self._spelled(self.pairs.aside())
        return {"held_out": _loss(self, batch), "recall@1": _recall(self.prior, self.pairs, count=PREVIEWED // 4)}


def _loss(objective: PriorObjective | CodesObjective, batch: Batch) -> float:
    device = next(objective.prior.parameters()).device
    return float(objective({name: tensor.to(device) for name, tensor in batch.items()})["loss"])


def _recall(prior: Prior | AutoregressivePrior, pairs: Pairs, *, count: int = PREVIEWED, steps: int = 1) -> float:
    """R@1 of one plain sample for each of the first `count` captions held out, among all the pictures held out."""
    data, rows = pairs.data, pairs.first_captions()
    cond = data.told([*rows[:count], NO_CAPTION]).to(device=next(prior.parameters()).device)
    plain = copy.deepcopy(prior)
    fold_text(plain, data.whitening)
    gallery = torch.from_numpy(data.embeddings[pairs.held_out, 0]).float()
    asked = len(rows[:count])
    told = Told(((cond.select(slice(asked)), 1.0),), cond.select(torch.full((asked,), asked)))
    samples = image_embeddings(plain, told, guidance=1.0, steps=steps, choose=1)
    return recall(samples, gallery, torch.arange(asked))

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
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Told
from ldm.diffusion.schedule import NOISE_SCHEDULES
from ldm.diffusion.state import noised
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.prior import Prior
from ldm.pipeline.prior import image_embeddings
from ldm.training.diffusion import NO_CAPTION
from ldm.training.loop import Batch, Objective
from ldm.training.prior_data import PriorPictures, fold_text
from ldm.training.prior_retrieval import recall
from ldm.types import Conditioning

PREVIEWED = 256
"""How many held-out captions are asked for embeddings when a prior looks at itself."""


@dataclass(frozen=True)
class Draw:
    """What both objectives draw from: the pictures, how likely each is, and how likely its caption is left out."""

    data: PriorPictures
    cumulative: Tensor
    drop: float

    def __call__(self, count: int, generator: torch.Generator) -> Batch:
        """embedding (B, P), what is told of it (see `_told`), plain: its text's vector, dropped: whether it has none.

        One caption of each picture, and the picture as it is or mirrored.
        """
        chosen = torch.searchsorted(self.cumulative, torch.rand(count, generator=generator).double())
        chosen = chosen.clamp(max=len(self.cumulative) - 1).tolist()
        draw = torch.rand(count, 3, generator=generator)
        first, last = self.data.first[chosen], self.data.first[[i + 1 for i in chosen]]
        captions = first + (draw[:, 0].numpy() * (last - first)).astype(np.int64)
        dropped = draw[:, 1] < self.drop
        rows = np.where(dropped.numpy(), len(self.data.lengths) + NO_CAPTION, captions)
        mirrored = self.data.flips[chosen] & (draw[:, 2] < 0.5).numpy()
        embedding = torch.from_numpy(self.data.embeddings[chosen, mirrored.astype(int)]).float()
        plain = self.data.vectors(captions.tolist())
        return batch_of(self.data, rows.tolist(), embedding) | {"plain": plain, "dropped": dropped}


def draw_from(data: PriorPictures, held_out: Sequence[int], share: np.ndarray | None, drop: float) -> Draw:
    """share: how likely each picture is drawn, None: all alike; those held out never are."""
    share = np.ones(len(data.embeddings)) if share is None else share.copy()
    share[list(held_out)] = 0.0
    return Draw(data, torch.from_numpy(np.cumsum(share / share.sum())), drop)


def batch_of(data: PriorPictures, rows: Sequence[int], embedding: Tensor) -> Batch:
    """Captions by row and the embeddings (B, P) of their pictures, as a batch."""
    cond = data.white(data.told(rows))
    assert cond.cross is not None and cond.vector is not None and cond.words is not None
    return {"embedding": embedding, "states": cond.cross, "vector": cond.vector, "words": cond.words}


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
        """The prior knows its statistics (`set_statistics`); the rest is as `draw_from` says."""
        super().__init__()
        self.prior, self.data, self.held_out = prior, data, list(held_out)
        self.denoiser = Denoiser(prior, NOISE_SCHEDULES[prior.config.schedule](), "x0")
        self.draw = draw_from(data, held_out, share, drop)

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """What `Draw` gives, noise (B, P) and timestep (B,)."""
        return self._noised(self.draw(count, generator), generator)

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
        rows, embedding = _held_out(self.data, self.held_out)
        batch = self._noised(batch_of(self.data, rows, embedding), generator)
        device = next(self.prior.parameters()).device
        loss = self({name: t.to(device) for name, t in batch.items()})["loss"]
        return {"held_out": float(loss), "recall@1": _recall(self.prior, self.data, self.held_out, steps=10)}


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
        """The prior knows how to spell (`set_speller`); the rest is as `draw_from` says."""
        super().__init__()
        self.prior, self.data, self.held_out = prior, data, list(held_out)
        self.draw = draw_from(data, held_out, share, drop)

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """What `Draw` gives, and which codes and similarity that is, (B, K) and (B,)."""
        return self._spelled(self.draw(count, generator))

    def _spelled(self, batch: Batch) -> Batch:
        speller = copy.deepcopy(self.prior.speller).cpu()
        similarity = speller.similarity(batch["plain"], batch["embedding"])
        similarity = similarity.masked_fill(batch["dropped"], self.prior.codes.similarities)
        return batch | {"codes": speller.encode(batch["embedding"]), "similarity": similarity}

    def forward(self, batch: Batch) -> Batch:
        """-> loss, in nats a code."""
        codes = batch["codes"]
        logits = self.prior(codes[:, :-1], batch["similarity"], _told(batch))
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """As `PriorObjective.evaluate`, but of fewer captions: spelling takes a step a code."""
        rows, embedding = _held_out(self.data, self.held_out)
        plain, dropped = self.data.vectors(rows), torch.zeros(len(rows), dtype=torch.bool)
        batch = self._spelled(batch_of(self.data, rows, embedding) | {"plain": plain, "dropped": dropped})
        device = next(self.prior.parameters()).device
        loss = self({name: t.to(device) for name, t in batch.items()})["loss"]
        return {
            "held_out": float(loss),
            "recall@1": _recall(self.prior, self.data, self.held_out, count=PREVIEWED // 4),
        }


def _held_out(data: PriorPictures, pictures: Sequence[int]) -> tuple[list[int], Tensor]:
    """The first captions of these pictures, and their embeddings (B, P)."""
    return data.first[list(pictures)].tolist(), torch.from_numpy(data.embeddings[list(pictures), 0]).float()


def _recall(
    prior: Prior | AutoregressivePrior,
    data: PriorPictures,
    pictures: Sequence[int],
    *,
    count: int = PREVIEWED,
    steps: int = 1,
) -> float:
    """R@1 of one plain sample for each of the first `count` captions, among all these pictures."""
    rows, gallery = _held_out(data, pictures)
    cond = data.told([*rows[:count], NO_CAPTION]).to(device=next(prior.parameters()).device)
    plain = copy.deepcopy(prior)
    fold_text(plain, data.whitening)
    asked = len(rows[:count])
    told = Told(((cond.select(slice(asked)), 1.0),), cond.select(torch.full((asked,), asked)))
    samples = image_embeddings(plain, told, guidance=1.0, steps=steps, choose=1)
    return recall(samples, gallery, torch.arange(asked))

"""How well a prior knows which picture a caption is of, against simpler guesses at the picture's embedding.

Each guess is compared by cosine with the embeddings of all left-out pictures; R@1 is how often the caption's own
picture comes first. Shapes: Q captions, G pictures, M known pairs, P width of CLIP's space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.guidance import Told
from ldm.evaluation.retrieval import ridge
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.prior import Prior
from ldm.pipeline.clip.prior import image_embeddings

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the ridge regression, in hundredths of what the texts' coordinates hold on average: M times their variance."""
ASKED = 256
"""Captions that are sampled for at a time."""


def recall(guesses: Tensor, gallery: Tensor, own: Tensor, at: int = 1) -> float:
    """R@`at` of guesses (Q, P) in a gallery (G, P), of which own (Q,) is the right one. Ties go to the guess."""
    likeness = F.normalize(guesses, dim=-1) @ F.normalize(gallery, dim=-1).T
    better = (~(likeness <= likeness.gather(1, own[:, None]))).sum(dim=1)  # so that a guess of NaN finds nothing
    return float((better < at).double().mean())


def prior_retrieval(
    prior: Prior | AutoregressivePrior,
    told: Told,
    gallery: Tensor,
    own: Tensor,
    known: tuple[Tensor, Tensor],
    *,
    steps: int = 25,
    guidance: Sequence[float] = (1.0, 2.0, 4.0),
    choose: Sequence[int] = (1, 2),
    seed: int = 0,
) -> dict[str, float]:
    """R@1 by the name of the guess.

    told:    Q left-out captions (`ldm.pipeline.clip.prior.tell`)
    gallery: (G, P) the pictures; own (Q,): which is whose
    known:   text vectors and picture embeddings (M, P) of the training set, of length sqrt(P)

    "chance", "text": the caption's own vector, "mean": of all known pictures, "ridge": with the penalty that is best on
    these very captions, which flatters it; "expectation": one step of the prior from pure noise, its estimate of the
    mean (diffusion priors alone); and "guidance G, best of C": samples.
    """
    ((cond, _),) = told.parts
    assert cond.vector is not None
    texts, pictures = known
    vectors = cond.vector.cpu()
    unit = 0.01 * len(texts) * float(texts.double().var(dim=0).mean())
    guesses = [ridge(texts, pictures, penalty * unit)(vectors) for penalty in PENALTIES]
    found = {
        "chance": 1 / len(gallery),
        "text": recall(vectors, gallery, own),
        "mean": recall(pictures.mean(dim=0).expand(len(own), -1), gallery, own),
        "ridge": max(recall(guess, gallery, own) for guess in guesses),
    }
    if isinstance(prior, Prior):
        found["expectation"] = recall(_samples(prior, told, seed, 1.0, 1, 1), gallery, own)
    for scale in guidance:
        for of in choose:
            samples = _samples(prior, told, seed, scale, steps, of)
            found[f"guidance {scale:g}, best of {of}"] = recall(samples, gallery, own)
    return found


def _samples(
    prior: Prior | AutoregressivePrior, told: Told, seed: int, guidance: float, steps: int, choose: int
) -> Tensor:
    """One embedding for each caption, (Q, P); caption i has the seed `seed` + i."""
    ((cond, _),) = told.parts
    assert cond.vector is not None and told.uncond is not None
    parts = []
    for start in range(0, len(cond.vector), ASKED):
        rows = slice(start, start + ASKED)
        part = Told(((cond.select(rows), 1.0),), told.uncond.select(rows))
        parts.append(image_embeddings(prior, part, seed=seed + start, guidance=guidance, steps=steps, choose=choose))
    return torch.cat(parts)

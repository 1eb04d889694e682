"""Whether samples are copies of training pictures; after Carlini et al. 2023, section 4.2.

A sample is held against every training picture in two spaces: latents, where a copy lies far nearer than the others do,
and CLIP's, which also knows a copy that was mirrored or moved. How near pictures lie that are no copies is read off the
set itself: off held-out pictures, and off each training picture against the other ones.
Shapes: K samples, N training pictures, M held-out ones, D numbers of a latent, P width of CLIP's space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import LdmError, printable
from ldm.evaluation.estimate import Z, student

BLOCK = 256
"""Rows that are compared at a time."""

COPY, NO_COPY = 0.3, 0.5
"""A sample nearer than the first is called a copy, one farther than the second is not, whatever the set is like;
relative as in `Copy`. A training picture with noise a third of its spread lies at 0.25, pictures of one style or of one
subject at 0.45 to 0.9."""

CALLED_SAME = 0.95
"""No sample whose cosine in CLIP's space is less than this is called a copy by that."""

ENOUGH = 8
"""So many pictures must show how near those lie that are no copies; with fewer, only the limits above count."""

NAMED = 8
"""How many copies the words name."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where pictures lie: latents (N, ...) and, if there is a CLIP, its vectors (N, P)."""

    latents: Tensor
    clip: Tensor | None = None


@dataclass(frozen=True)
class Copy:
    """A sample and the training picture that it is nearest to.

    distance: in latent space, over the median distance from the sample to all the other training pictures
    cosine:   in CLIP's space, of the training picture that is nearest there, or None without a CLIP
    picture:  in CLIP's space if the sample is near by CLIP alone, else in latent space
    near:     whether it counts as a near copy
    """

    sample: int
    picture: int
    distance: float
    cosine: float | None
    near: bool


@dataclass(frozen=True)
class CopyCheck:
    """The nearest training picture of each sample, in order; below which distance and above which cosine it counts as a
    near copy; and what was found in words."""

    nearest: tuple[Copy, ...]
    distance_limit: float
    cosine_limit: float | None
    sentences: tuple[str, ...]

    @property
    def copies(self) -> tuple[Copy, ...]:
        """The near copies, the nearest first."""
        return tuple(sorted((c for c in self.nearest if c.near), key=lambda copy: copy.distance))


def check_copies(samples: Places, train: Places, held_out: Places, names: Sequence[str] = ()) -> CopyCheck:
    """Samples (K, ...) against training pictures (N, ...), N >= 3, with held-out ones (M, ...), M >= 0, to compare.

    A fresh picture counts as a near copy about once in a hundred times, and less often where the set's pictures lie far
    apart. names: of the training pictures; else they go by number, from 1.
    Raises LdmError for fewer than three training pictures, and for numbers that are not finite.
    """
    if len(train.latents) < 3:
        raise LdmError(f"training pictures: found {len(train.latents)}; finding copies takes 3 at least")
    for place in (samples, train, held_out):
        if not all(x.isfinite().all() for x in (place.latents, place.clip) if x is not None):
            raise LdmError("latents: not all are finite numbers; the pictures or the samples are damaged")
    distance, picture = _distances(samples.latents, train.latents)
    usual, _ = _distances(train.latents, train.latents, same=True)
    if len(held_out.latents):
        usual = torch.cat([usual, _distances(held_out.latents, train.latents)[0]])
    distance_limit = min(NO_COPY, max(COPY, _limit(usual)))
    near = distance < distance_limit
    cosine, cosine_limit = None, None
    if samples.clip is not None and train.clip is not None:
        cosine, seen = _cosines(samples.clip, train.clip)
        alikeness, _ = _cosines(train.clip, train.clip, same=True)
        if held_out.clip is not None:
            alikeness = torch.cat([alikeness, _cosines(held_out.clip, train.clip)[0]])
        cosine_limit = math.cos(min(math.acos(CALLED_SAME), _limit(alikeness.clamp(-1, 1).acos())))
        alike = cosine > cosine_limit
        picture = torch.where(alike & ~near, seen, picture)
        near = near | alike
    nearest = tuple(
        Copy(i, int(picture[i]), distance[i].item(), None if cosine is None else cosine[i].item(), bool(near[i]))
        for i in range(len(distance))
    )
    return CopyCheck(nearest, distance_limit, cosine_limit, _sentences(nearest, len(usual), distance_limit, names))


def _limit(nearest: Tensor) -> float:
    """What one more of these distances falls below once in a hundred times; infinite for fewer than `ENOUGH`.

    As many pictures lie within r as r to the power of their dimensions, so that a distance to the nearest one follows
    Weibull's distribution, and its logarithm Gumbel's. Place and scale are read off the median and the median distance
    from it, 0.767 times Gumbel's scale, which duplicates among the training pictures do not move; and the limit is
    lowered for what is not known of them, as it is for a normal distribution.
    """
    count = len(nearest)
    if count < ENOUGH:
        return math.inf
    logs = nearest.clamp(min=1e-6).log()
    middle = logs.quantile(0.5)
    scale = (logs - middle).abs().quantile(0.5) / 0.767
    below = math.log(math.log(2)) - math.log(-math.log(0.99))
    unsure = student(count - 1) / Z * math.sqrt(1 + 1 / count)
    return float((middle - below * unsure * scale).exp())


def _distances(rows: Tensor, train: Tensor, same: bool = False) -> tuple[Tensor, Tensor]:
    """How far the nearest training picture is, over the median of the others, and which it is; (K,) each.

    same: rows are the training pictures, and none is held against itself
    """
    rows, train = rows.flatten(1).float(), train.flatten(1).float()
    center = train.mean(dim=0)  # less is lost where squares are subtracted
    distances, pictures = [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    train = train - center
    for first, block in enumerate((rows - center).split(BLOCK)):
        squares = block.square().sum(dim=1)[:, None] + train.square().sum(dim=1) - 2 * block @ train.T
        distance = squares.clamp(min=0).sqrt()
        if same:
            _hide_diagonal(distance, first * BLOCK, math.inf)
        ordered, order = distance.sort(dim=1)
        others = ordered[:, 1 : len(train) - same].median(dim=1).values
        distances.append(ordered[:, 0] / others.clamp(min=1e-12))
        pictures.append(order[:, 0])
    return torch.cat(distances), torch.cat(pictures)


def _cosines(rows: Tensor, train: Tensor, same: bool = False) -> tuple[Tensor, Tensor]:
    """The greatest cosine with a training picture, and which one's it is; (K,) each."""
    rows, train = F.normalize(rows.float(), dim=1), F.normalize(train.float(), dim=1)
    cosines, pictures = [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    for first, block in enumerate(rows.split(BLOCK)):
        cosine = block @ train.T
        if same:
            _hide_diagonal(cosine, first * BLOCK, -math.inf)
        greatest = cosine.max(dim=1)
        cosines.append(greatest.values)
        pictures.append(greatest.indices)
    return torch.cat(cosines), torch.cat(pictures)


def _hide_diagonal(block: Tensor, first: int, value: float) -> None:
    """Where row i of the block is picture first + i."""
    block.diagonal(offset=first).fill_(value)


def _sentences(nearest: tuple[Copy, ...], usual: int, limit: float, names: Sequence[str]) -> tuple[str, ...]:
    count, copies = len(nearest), sorted((copy for copy in nearest if copy.near), key=lambda copy: copy.distance)
    words = [f"None of {count} samples is a near copy of a training picture."]
    if copies:
        listed = "; ".join(_words(copy, limit, names) for copy in copies[:NAMED])
        more = f"; and {len(copies) - NAMED} more" if len(copies) > NAMED else ""
        are = "is a near copy of a training picture" if len(copies) == 1 else "are near copies of training pictures"
        words = [f"{len(copies)} of {count} samples {are}: {listed}{more}."]
    if usual < ENOUGH:
        words.append("With so few pictures this goes by a rule of thumb.")
    return tuple(words)


def _words(copy: Copy, limit: float, names: Sequence[str]) -> str:
    name = printable(names[copy.picture]) if names else f"picture {copy.picture + 1}"
    cosine = "" if copy.cosine is None else f"CLIP's cosine {copy.cosine:.2f}"
    if copy.distance >= limit:
        return f"sample {copy.sample + 1} of {name} ({cosine}, moved or mirrored)"
    distance = f"{100 * copy.distance:.0f}% of the usual distance"
    return f"sample {copy.sample + 1} of {name} ({', '.join(filter(None, (distance, cosine)))})"

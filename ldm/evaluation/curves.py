"""What was measured while a model was tuned, and what the numbers say.

Shapes: S times it was looked at, N pictures that are trained on, M held out, T timesteps, L steps that were logged.
A loss counts relative to the mean at its timestep before the first step, so that the timesteps count alike and a fall
of 0.05 means 5%. Every question is asked of the same picture, noise and timestep each time, so differences are paired.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.estimate import FEW, Estimate, mean

LEAST = 0.005
"""A change of a loss that is worth a word."""

CAPTIONS = 8
"""So many captions that differ are needed for CLIP to say whether they fit."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Losses of fixed pictures with fixed noise, before the first step and at some of those after it.

    steps:            (S,), the first is 0
    timesteps:        (T,)
    train:            (S, N, T), told their own captions
    train_swapped:    (S, N, T), told those of other pictures
    held_out:         (S, M, T) and held_out_swapped the same of pictures that are not trained on; M may be 0
    logged:           (L,), steps whose learning rates (L,) follow and, where they are known, norms of gradients (L,)
    pictures, epochs: how many pictures are trained on, and how often each was seen
    similarity:       (P, P), CLIP's cosines of pictures (rows) with captions (columns), picture i's own in column i
    """

    steps: Tensor
    timesteps: Tensor
    train: Tensor
    train_swapped: Tensor
    held_out: Tensor
    held_out_swapped: Tensor
    logged: Tensor
    rates: Tensor
    pictures: int
    epochs: float
    gradients: Tensor | None = None
    similarity: Tensor | None = None

    def __post_init__(self) -> None:
        s, t = len(self.steps), len(self.timesteps)
        if s < 2 or self.steps[0] != 0 or (self.steps.diff() <= 0).any():
            raise LdmError(f"steps: {self.steps.tolist()}; expected 0 and then one step or more, in order")
        for name in ("train", "held_out"):
            one, other = getattr(self, name).shape, getattr(self, f"{name}_swapped").shape
            if len(one) != 3 or (one[0], one[2]) != (s, t) or one != other or (name == "train" and not one[1]):
                raise LdmError(
                    f"{name}: {tuple(one)} and, swapped, {tuple(other)}; expected ({s}, pictures, {t}) twice"
                )
        gradients = self.logged if self.gradients is None else self.gradients
        if not len(self.logged) == len(self.rates) == len(gradients):
            raise LdmError("logged: so many steps, rates and gradients were expected as of each other")

    @property
    def last(self) -> int:
        """The last step."""
        return int(self.steps[-1])


@dataclass(frozen=True)
class HeldOut:
    """Falls of the loss on pictures that were not trained on.

    fall: to the end; best: to where it is least; rise: from there to the end; late: in the second half of the run
    gap:  how much more the training pictures' fell
    """

    fall: Estimate
    best: Estimate
    rise: Estimate
    late: Estimate
    gap: Estimate


@dataclass(frozen=True)
class Figures:
    """What a verdict is made of.

    broken:         the first step with a loss that is no number; all else is of the steps before it
    train_fall:     of the loss on training pictures, to the end; train_return: how much it rose from its least
    best_step:      going forward, a step takes the place of the best one so far if its held-out loss is less by more
                    than one standard error: later steps never change what was kept. With none held out, the last step
    gap_step:       from when on held-out pictures do no better and training pictures do, by more than noise
    told_at_start:  the logarithm of how many times the loss is greater when told another picture's caption, of all
                    pictures before the first step, when none was trained on
    told_at_best:   and of held-out ones at the best step; None where too few have captions that differ
    clip:           by how much of their number CLIP puts own captions before the middle, 0 is chance and 0.5 the best
    recall:         how often it puts the own one first
    """

    broken: int | None
    train_fall: Estimate
    train_return: Estimate
    held_out: HeldOut | None
    best_step: int
    gap_step: int | None
    told_at_start: Estimate | None
    told_at_best: Estimate | None
    clip: Estimate | None
    recall: float | None


def figures(curves: Curves) -> Figures:
    """The figures of a run. Raises LdmError where the losses before the first step are no numbers above 0."""
    losses = torch.cat([curves.train, curves.held_out], dim=1).double()
    sound = losses.isfinite().flatten(1).all(dim=1).int().cumprod(dim=0).bool()
    base = losses[0].mean(dim=0)
    if not sound[0] or not (base > 0).all():
        raise LdmError("step 0: the losses are not finite or not above 0; check the base model with ldm info --deep")
    broken = None if sound.all() else int(curves.steps[int(sound.int().sum())])
    seen = _relative(curves, base, int(sound.int().sum()))
    least = int(seen.train.mean(dim=(1, 2)).argmin())
    best = _best(seen.held_out)
    told_train, told_held_out = (seen.train_swapped / seen.train).log(), (seen.held_out_swapped / seen.held_out).log()
    clip, recall = (None, None) if curves.similarity is None else _ranks(curves.similarity.double())
    return Figures(
        broken=broken,
        train_fall=mean(seen.train[0] - seen.train[-1]),
        train_return=mean(seen.train[-1] - seen.train[least]),
        held_out=_held_out(seen),
        best_step=int(seen.steps[best]),
        gap_step=_gap_step(seen),
        told_at_start=_told(torch.cat([told_train[0], told_held_out[0]])),
        told_at_best=_told(told_held_out[best]),
        clip=clip,
        recall=recall,
    )


def _relative(curves: Curves, base: Tensor, count: int) -> Curves:
    """The first so many steps, in float64, each loss over its timestep's at the start."""
    names = [f.name for f in fields(curves) if f.name.removesuffix("_swapped") in ("train", "held_out")]
    cut = {name: getattr(curves, name)[:count].double() / base for name in names}
    if count == 1:  # a run that broke at once: it stood still until then
        cut = {name: tensor.repeat(2, 1, 1) for name, tensor in cut.items()}
        return replace(curves, steps=torch.tensor([0, 1]), **cut)
    return replace(curves, steps=curves.steps[:count], **cut)


def _best(held_out: Tensor) -> int:
    """Which look is the best, as `Figures` says. held_out (S, M, T)"""
    if not held_out.shape[1]:
        return len(held_out) - 1
    best = 0
    for look in range(1, len(held_out)):
        better = mean(held_out[best] - held_out[look])
        if better.value > better.error:
            best = look
    return best


def _held_out(seen: Curves) -> HeldOut | None:
    losses = seen.held_out
    if not losses.shape[1]:
        return None
    least = int(losses.mean(dim=(1, 2)).argmin())
    half = int((seen.steps - seen.last / 2).abs().argmin())
    fall = mean(losses[0] - losses[-1])
    return HeldOut(
        fall=fall,
        best=mean(losses[0] - losses[least]),
        rise=mean(losses[-1] - losses[least]),
        late=mean(losses[half] - losses[-1]),
        gap=mean(seen.train[0] - seen.train[-1]) - fall,
    )


def _gap_step(seen: Curves) -> int | None:
    """The first step after the least held-out loss, from which on training pictures' has fallen more, beyond noise."""
    if not seen.held_out.shape[1]:
        return None
    least = int(seen.held_out.mean(dim=(1, 2)).argmin())
    found = None
    for look in range(len(seen.steps) - 1, least, -1):
        gap = mean(seen.train[0] - seen.train[look]) - mean(seen.held_out[0] - seen.held_out[look])
        if not gap.above(LEAST):
            break
        found = int(seen.steps[look])
    return found


def _told(ratio: Tensor) -> Estimate | None:
    """The mean of logarithms (N, T), without the pictures that had no other caption to be told."""
    others = ratio[(ratio != 0).any(dim=1) & ratio.isfinite().all(dim=1)]
    return mean(others) if len(others) >= FEW else None


def _ranks(similarity: Tensor) -> tuple[Estimate | None, float | None]:
    """How far before the middle CLIP puts own captions, and how often first.

    A caption that likes every picture is no better than its mean, so that is taken off. If captions were dealt out at
    random, each place would be as likely: a variance of (1 - 1 / P^2) / 12.
    """
    count = len(similarity)
    if torch.unique(similarity, dim=1).shape[1] < CAPTIONS:
        return None, None
    likes = similarity - similarity.mean(dim=0)
    own = likes.diagonal()[:, None]
    before, equal = (likes > own).sum(dim=1), (likes == own).sum(dim=1)
    place = (before + equal / 2).double() / count
    first = ((before == 0) / equal).double()
    error = ((1 - count**-2) / 12 / count) ** 0.5
    return Estimate(0.5 - place.mean().item(), error, 1000), first.mean().item()

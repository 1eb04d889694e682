"""What became of a tuning run, in plain words: did it work, what went wrong, what to try."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm.evaluation.curves import LEAST, Curves, Figures, figures
from ldm.evaluation.words import Fit, Outcome, remarks, told_of

RETURN = 0.25
"""The share of what held-out pictures had gained that a run may lose again, or of what training pictures gained that
they may miss, before it counts as learned by heart."""

LATE = 1 / 3
"""The share of a gain in the second half of a run from which on the run was too short. In 1 - exp(-k s), which has
reached the share 1 - exp(-k) of all there is, that is k = 1.4 and a share of three quarters."""

HEART_EPOCHS, HEART_FALL = 100, 0.2
"""With no picture held out: a training loss that fell so far, when each was seen so often, was learned by heart."""

TOLD = 16
"""So many pictures with different captions are needed to say by losses alone that captions do not fit."""


@dataclass(frozen=True)
class Verdict:
    """What happened, in a word; the step whose weights to keep, 0 where none is better than the untuned model; the
    step from which training and held-out pictures part; what was measured; and all of it in sentences."""

    outcome: Outcome
    best_step: int
    gap_step: int | None
    captions: Fit
    figures: Figures
    sentences: tuple[str, ...]
    advice: tuple[str, ...]


def verdict(curves: Curves) -> Verdict:
    """The verdict on a run. Raises LdmError where the losses before the first step are no numbers above 0."""
    found = figures(curves)
    captions = _captions(found)
    outcome = _outcome(curves, found, captions)
    sentences, advice = told_of(outcome, curves, found)
    sentences = (*sentences, *remarks(outcome, captions, curves, found))
    return Verdict(outcome, found.best_step, found.gap_step, captions, found, sentences, advice)


def _outcome(curves: Curves, found: Figures, captions: Fit) -> Outcome:
    """The first that applies, the graver ones first."""
    fall, held_out = found.train_fall, found.held_out
    if found.broken is not None or (-fall).above(LEAST):
        return "diverged"
    if not fall.above(LEAST):
        return "diverged" if found.train_return.above(2 * LEAST) else "nothing learned"
    if captions == "do not fit":
        return "captions do not fit"
    if held_out is None:
        by_heart = curves.epochs >= HEART_EPOCHS and fall.value > HEART_FALL
        return "learned by heart" if by_heart else "not known"
    if held_out.rise.above(LEAST) and held_out.rise.value >= RETURN * held_out.best.value:
        return "learned by heart"
    if held_out.late.above(LEAST) and held_out.late.value >= LATE * held_out.fall.value > 0:
        return "too short"
    if held_out.gap.above(LEAST) and held_out.fall.value < RETURN * fall.value:
        return "learned by heart"
    return "worked" if held_out.best.above(LEAST) else "not known"


def _captions(found: Figures) -> Fit:
    """Whether captions fit: to a model that knows their words, a picture's own tells more than another's.

    CLIP weighs more: where it sees no fit the losses must be half as sure again, and it can say so of fewer pictures.
    """
    clip, told = found.clip, [e for e in (found.told_at_start, found.told_at_best) if e is not None]
    if clip is not None and clip.above():
        return "fit"
    if any(e.value > (e.noise if clip is None else 1.5 * e.noise) for e in told):
        return "fit"
    if clip is not None:
        return "do not fit" if clip.value + clip.noise < 0.35 else "not known"
    start = found.told_at_start
    if start is None or start.freedom + 1 < TOLD:
        return "not known"
    return "do not fit" if start.value < start.error * math.sqrt(start.freedom + 1) / 3 else "not known"

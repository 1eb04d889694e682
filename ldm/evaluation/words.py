"""What happened in a tuning run and what to try, in sentences."""

from __future__ import annotations

import math
from typing import Literal

from ldm.evaluation.curves import LEAST, Curves, Figures
from ldm.evaluation.estimate import Estimate

Outcome = Literal[
    "worked", "nothing learned", "too short", "learned by heart", "captions do not fit", "diverged", "not known"
]
Fit = Literal["fit", "do not fit", "not known"]
Sentences = tuple[str, ...]

SMALL = 20
"""A set of fewer pictures is small."""


def told_of(outcome: Outcome, curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    """What happened, and what to try."""
    tell = {
        "worked": _worked,
        "nothing learned": _nothing,
        "too short": _too_short,
        "learned by heart": _by_heart,
        "captions do not fit": _misfit,
        "diverged": _diverged,
        "not known": _not_known,
    }[outcome]
    return tell(curves, found)


def remarks(outcome: Outcome, captions: Fit, curves: Curves, found: Figures) -> Sentences:
    """What is said whatever happened: of the gap, of the captions, and of how rough the figures are."""
    words = []
    if found.gap_step is not None and outcome in ("worked", "learned by heart", "captions do not fit"):
        words.append(f"Training and held-out pictures part at step {found.gap_step}: from there only the former gain.")
    if captions == "fit" and found.told_at_start is not None:
        words.append(
            f"The captions fit: told another picture's, the untuned model's loss is {_change(found.told_at_start)}."
        )
    if captions == "do not fit" and outcome != "captions do not fit":
        words.append("The captions do not seem to fit the pictures either.")
    if found.clip is not None and found.recall is not None:
        words.append(
            f"CLIP puts a picture's own caption before {_share(0.5 + found.clip.value)} of all captions, where chance "
            f"is 50%, and first for {_share(found.recall)} of the pictures."
        )
    held_out = curves.held_out.shape[1]
    if held_out and (held_out + curves.pictures < SMALL or held_out < 5):
        words.append(f"No more than {_pictures(held_out)} held out, so these figures are rough.")
    return tuple(words)


def _worked(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    assert found.held_out is not None
    best, rise = found.best_step, found.held_out.rise
    happened = (
        f"It worked: on pictures that were not trained on, the loss fell by {_percent(found.held_out.best)} by step "
        f"{best}; on training pictures it fell by {_percent(found.train_fall)} by the end."
    )
    if best == curves.last:
        return (happened,), (f"Keep step {best}, the last.",)
    later = "Later steps are not better by more than chance."
    if rise.above(LEAST):
        later = f"After that it rose again by {_percent(rise)}, so later steps are worse."
    return (happened, later), (f"Keep step {best}; a run of so many steps is enough.",)


def _nothing(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    moved = f"the loss on training pictures changed by {_percent(found.train_fall)}, which may be chance"
    if found.train_fall.value == found.train_fall.error == 0:
        moved = "not one loss changed"
    elif found.train_fall.above():
        moved = f"the loss on training pictures fell by no more than {_percent(found.train_fall)}"
    happened = (f"Nothing was learned: in {curves.last} steps {moved}.", *_rate(curves))
    if len(curves.rates) and not curves.rates.any():
        return happened, ("Give a learning rate above 0: 1e-4 is usual for a LoRA, 1e-5 for a full fine-tune.",)
    if curves.gradients is not None and len(curves.gradients) and not curves.gradients.any():
        return (
            (*happened, "No gradient reached what was trained."),
            ("Check what is trained: the adapter must be in the network that is run, and not frozen.",),
        )
    return happened, (
        f"Try ten times the learning rate{_times_rate(curves, 10)}.",
        f"If that learns little too, train for {4 * curves.last} steps.",
    )


def _too_short(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    assert found.held_out is not None
    fall, late = found.held_out.fall, found.held_out.late
    happened = (
        f"It was too short: on pictures that were not trained on, the loss fell by {_percent(fall)}, "
        f"{_share(late.value / fall.value)} of that in the second half, and was still falling at the end "
        f"(step {curves.last})."
    )
    return (happened,), (
        f"Train for {2 * curves.last} to {3 * curves.last} steps.",
        f"Or try twice the learning rate{_times_rate(curves, 2)}.",
    )


def _by_heart(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    learned = (
        f"It learned its {curves.pictures} pictures by heart: each was seen {_count(curves.epochs)} times, and their "
        f"loss fell by {_percent(found.train_fall)}"
    )
    held = found.held_out
    if held is None:
        happened = f"{learned}; most likely, since no picture was held out to compare with."
    elif found.best_step == 0:
        happened = f"{learned}, while on others it never fell by more than chance."
    elif held.rise.above(LEAST):
        happened = (
            f"{learned}, while on others it fell by {_percent(held.best)} by step {found.best_step} "
            f"and then rose by {_percent(held.rise)}."
        )
    else:
        happened = f"{learned}, but on others by no more than {_percent(held.best)}."
    shorter = f"Train for at most {max(1, curves.last // 10)} steps."
    if held is not None and found.best_step:
        seen = max(1, round(curves.epochs * found.best_step / curves.last))
        times = "once" if seen == 1 else f"{seen} times"
        shorter = f"Keep step {found.best_step}, or train for so many steps (each picture seen {times})."
    more = "More pictures, and more different ones, help most."
    if curves.pictures < SMALL:
        more = f"More pictures help most: {SMALL} or more, where {curves.pictures} were given."
    slower = "A lower rank, captions dropped now and then, or half the learning rate slow it down."
    return (happened,), (shorter, more, slower)


def _misfit(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    happened = ["The captions do not fit the pictures, as far as the model can see."]
    if found.told_at_start is not None:
        happened.append(
            "Told another picture's caption, the untuned model's loss is "
            f"{_change(found.told_at_start)} than told a picture's own, which may be chance."
        )
    happened.append(
        f"On training pictures the loss fell by {_percent(found.train_fall)} all the same: by their look alone, or by "
        "heart."
    )
    return tuple(happened), (
        "Look at a few pictures beside their captions: were files renamed, or lists sorted in another order?",
        "If every caption is right, the model does not know their words: use plainer ones, or train the text encoder "
        "too.",
    )


def _diverged(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    if found.broken is not None:
        happened = [f"The run broke: at step {found.broken} the losses were no longer numbers."]
    elif (-found.train_fall).above(LEAST):
        happened = [
            "The run made the model worse: on the very pictures that it trains on the loss rose by "
            f"{_percent(found.train_fall)}."
        ]
    else:
        happened = [f"The run lost what it had learned: the loss rose again by {_percent(found.train_return)}."]
    return (*happened, *_gradient(curves), *_rate(curves)), (
        f"Try a tenth of the learning rate{_times_rate(curves, 0.1)}, with a warm-up.",
        "If that breaks too, look for a damaged picture, and train in 32 bits.",
    )


def _not_known(curves: Curves, found: Figures) -> tuple[Sentences, Sentences]:
    learned = f"The training pictures were learned: their loss fell by {_percent(found.train_fall)}."
    others = "Whether others gain too cannot be said: no picture was held out."
    if found.held_out is not None:
        change = "changed by " + _percent(found.held_out.fall)
        others = f"Whether others gain too cannot be said: the loss on those held out {change}, which may be chance."
    held_out = curves.held_out.shape[1]
    known = f"With {SMALL} pictures or more, and a fifth of them held out, it can be said."
    if held_out and held_out + curves.pictures >= SMALL:
        known = f"Train for longer, or hold out more pictures than {held_out}, and it can be said."
    return (learned, others), ("Judge by the samples.", known)


def _gradient(curves: Curves) -> Sentences:
    """Where the gradient was very great."""
    if curves.gradients is None:
        return ()
    known = curves.gradients.isfinite()
    if not known.any():
        return ()
    norms = curves.gradients.where(known, 0)
    greatest, usual = norms.max(), curves.gradients[known].median()
    if not greatest > 10 * usual > 0:
        return ()
    return (
        f"The gradient was {greatest / usual:.0f} times as great as usual at step {curves.logged[norms.argmax()]}.",
    )


def _rate(curves: Curves) -> Sentences:
    if not len(curves.rates):
        return ()
    if not curves.rates.any():
        return ("The learning rate was 0 at every step.",)
    return (f"The learning rate was {curves.rates.max():.2g} at its highest.",)


def _times_rate(curves: Curves, times: float) -> str:
    """ " (0.001)", where the rate is known."""
    return f" ({times * curves.rates.max():.2g})" if len(curves.rates) else ""


def _pictures(count: int) -> str:
    return "one picture was" if count == 1 else f"{count} pictures were"


def _percent(change: Estimate) -> str:
    """ "6.2% (± 0.4%)", without a sign."""
    error = f" (± {100 * change.error:.1f}%)" if math.isfinite(change.error) else ""
    return f"{100 * abs(change.value):.1f}%{error}"


def _change(ratio: Estimate) -> str:
    """ "5.7% (± 1.1%) greater", of the logarithm of a ratio."""
    percent, error = 100 * math.expm1(ratio.value), 100 * ratio.error * math.exp(ratio.value)
    return f"{abs(percent):.1f}% (± {error:.1f}%) {'greater' if percent > 0 else 'less'}"


def _share(share: float) -> str:
    return f"{100 * share:.0f}%"


def _count(number: float) -> str:
    """ "7.5" or "1,333"."""
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"

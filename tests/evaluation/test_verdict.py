"""Verdicts on runs whose losses follow a closed form, so that what happened is known; and the estimates below them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation.curves import Curves, figures
from ldm.evaluation.estimate import Estimate, mean, student
from ldm.evaluation.verdict import Verdict, verdict

SEEDS = range(60)


@dataclass(frozen=True)
class Run:
    """A simple model of learning. What all pictures share is learned as gain (1 - exp(-speed x)) at x = step / last;
    a training picture's own look as heart (1 - exp(-x)), and it costs other pictures cost x^2.

    words: the logarithm of what another's caption costs, as its mean and its spread over pictures
    wobble: the noise of each loss at each step, relative
    """

    train: int = 16
    held_out: int = 8
    looks: int = 11
    gain: float = 0.08
    speed: float = 6.0
    heart: float = 0.02
    cost: float = 0.0
    words: tuple[float, float] = (0.056, 0.05)
    wobble: float = 0.01
    last: int = 1000
    rate: float = 1e-4
    pictures: int = 64
    epochs: float = 15.6

    def curves(self, seed: int) -> Curves:
        draw = np.random.default_rng(seed)
        x = np.linspace(0, 1, self.looks)[:, None, None]
        common = self.gain * (1 - np.exp(-self.speed * x))

        def losses(count: int, own: np.ndarray) -> tuple[Tensor, Tensor]:
            floor = np.array([0.13, 0.12, 0.16, 0.27, 0.52]) * np.exp(0.3 * draw.normal(size=(1, count, 1)))
            scale = np.exp(0.3 * draw.normal(size=(1, count, 5)))  # not every picture gains alike
            noise = self.wobble * draw.normal(size=(self.looks, count, 5)) * (x > 0)
            told = np.exp(self.words[0] + self.words[1] * draw.normal(size=(1, count, 1)))
            told = told * np.exp(0.05 * draw.normal(size=(1, count, 5)))
            loss = floor * (1 + scale * own + noise)
            return torch.tensor(loss), torch.tensor(loss * told)

        train, train_swapped = losses(self.train, -common - self.heart * (1 - np.exp(-x)))
        held_out, held_out_swapped = losses(self.held_out, -common + self.cost * x**2)
        return Curves(
            steps=torch.linspace(0, self.last, self.looks).round().long(),
            timesteps=torch.tensor([100, 300, 500, 700, 899]),
            train=train,
            train_swapped=train_swapped,
            held_out=held_out,
            held_out_swapped=held_out_swapped,
            logged=torch.arange(self.last),
            rates=torch.full((self.last,), self.rate),
            gradients=torch.full((self.last,), 0.3),
            pictures=self.pictures,
            epochs=self.epochs,
        )


GOOD = Run()
FROZEN = Run(gain=0, heart=0, wobble=0, rate=0)
NOISY_NOTHING = Run(gain=0, heart=0, rate=1e-9)
FOUR = Run(train=3, held_out=1, pictures=3, epochs=667, last=2000, gain=0.03, speed=20, heart=0.5, cost=0.3)
OVERFITTED = Run(heart=0.3, cost=0.12, speed=12)
SHORT = Run(speed=0.7, heart=0.0)
SHUFFLED = Run(train=24, words=(0.0, 0.05))
WORSE = Run(gain=-0.3, heart=0)


def outcomes(run: Run) -> Counter[str]:
    return Counter(verdict(run.curves(seed)).outcome for seed in SEEDS)


@pytest.mark.parametrize(
    ("run", "outcome", "least"),
    [
        (GOOD, "worked", 0.95),
        (FROZEN, "nothing learned", 1.0),
        (NOISY_NOTHING, "nothing learned", 0.95),
        (FOUR, "learned by heart", 0.95),
        (replace(FOUR, held_out=0), "learned by heart", 1.0),
        (OVERFITTED, "learned by heart", 1.0),
        (SHORT, "too short", 0.95),
        (SHUFFLED, "captions do not fit", 0.9),
        (WORSE, "diverged", 1.0),
    ],
    ids=["good", "rate 0", "tiny rate", "four pictures", "none held out", "overfitted", "short", "shuffled", "worse"],
)  # fmt: skip
def test_the_outcome_is_what_was_simulated(run: Run, outcome: str, least: float):
    found = outcomes(run)
    assert found[outcome] >= least * len(SEEDS), found


def test_captions_that_fit_are_not_accused():
    """Also with few pictures; and seldom where the words tell the model half as much as they do in the shipped one."""
    assert outcomes(GOOD)["captions do not fit"] == 0
    assert outcomes(replace(GOOD, train=5, held_out=2, pictures=5))["captions do not fit"] == 0
    assert outcomes(replace(GOOD, words=(0.028, 0.05)))["captions do not fit"] <= 0.12 * len(SEEDS)


def said(result: Verdict) -> str:
    return " ".join((*result.sentences, *result.advice))


def test_the_words_of_the_three_planted_runs():
    nothing = said(verdict(FROZEN.curves(0)))
    assert "not one loss changed" in nothing and "rate was 0 at every step" in nothing and "1e-4" in nothing
    four = said(verdict(FOUR.curves(0)))
    assert "learned its 3 pictures by heart" in four and "667 times" in four and "20 or more" in four
    assert "one picture was held out, so these figures are rough" in four
    shuffled = said(verdict(SHUFFLED.curves(0)))
    assert "captions do not fit" in shuffled and "beside their captions" in shuffled


def test_a_run_that_breaks():
    curves = GOOD.curves(0)
    for name in ("train", "held_out"):
        getattr(curves, name)[4:] = torch.nan
    assert curves.gradients is not None
    curves.gradients[399] = 300
    curves.gradients[400:] = torch.nan
    result = verdict(curves)
    assert result.outcome == "diverged" and result.best_step <= 300
    assert "at step 400 the losses were no longer numbers" in said(result)
    assert "1000 times as great as usual at step 399" in said(result) and "1e-05" in said(result)
    curves.train[1:] = math.inf
    assert verdict(curves).outcome == "diverged"
    curves.train[0, 0, 0] = math.nan
    with pytest.raises(LdmError, match="step 0: the losses are not finite"):
        verdict(curves)


def test_no_gradient():
    curves = FROZEN.curves(0)
    result = verdict(replace(curves, rates=torch.full((1000,), 1e-4), gradients=torch.zeros(1000)))
    assert result.outcome == "nothing learned" and "No gradient reached" in said(result)
    unknown = verdict(replace(curves, rates=torch.full((1000,), 1e-4), gradients=None))
    assert "No gradient reached" not in said(unknown) and "ten times the learning rate (0.001)" in said(unknown)


def test_learned_and_lost_again():
    """The loss falls and comes back to where it began."""
    curves = GOOD.curves(0)
    for name in ("train", "held_out"):
        getattr(curves, name)[-1] = getattr(curves, name)[0]
    result = verdict(curves)
    assert result.outcome == "diverged" and "lost what it had learned" in said(result)


def test_best_step_without_noise():
    """gain (1 - exp(-speed x)) - cost x^2 is greatest where gain speed exp(-speed x) = 2 cost x."""
    for cost in (0.02, 0.05, 0.1):
        run = replace(GOOD, cost=cost, looks=201, wobble=0.0, held_out=400)
        x = np.linspace(0, 1, 201)
        best = x[np.argmin(np.abs(run.gain * run.speed * np.exp(-run.speed * x) - 2 * cost * x))]
        result = verdict(run.curves(0))
        # so little before it that it makes no difference, and never after it
        assert 0.8 * best <= result.best_step / 1000 <= best + 0.005
        if result.figures.held_out and result.outcome == "learned by heart":
            assert result.gap_step is not None and result.gap_step / 1000 >= best - 0.005


def test_later_steps_do_not_change_what_was_best():
    """So that the weights of the best step can be kept on the way: each best step was the best one when it came."""
    for seed in range(10):
        curves = replace(GOOD, held_out=3, wobble=0.05).curves(seed)
        bests = [0]
        for looks in range(2, 12):
            names = "steps", "train", "train_swapped", "held_out", "held_out_swapped"
            bests.append(figures(replace(curves, **{name: getattr(curves, name)[:looks] for name in names})).best_step)
            assert bests[-1] in (bests[-2], curves.steps[looks - 1])


def test_the_step_before_a_plateau_is_best():
    """All that is learned is learned by step 200, and noise makes later steps look better or worse. The least loss is
    among the first 7 of 11 looks six times in ten; what counts as best is there more often, and never the first."""
    run = replace(GOOD, speed=30.0, heart=0.0, cost=0.0)
    assert sum(verdict(run.curves(seed)).best_step <= 600 for seed in SEEDS) >= 0.7 * len(SEEDS)
    assert all(verdict(run.curves(seed)).best_step > 0 for seed in SEEDS)


def test_untuned_is_best_where_others_only_lose():
    result = verdict(replace(OVERFITTED, gain=0.0).curves(0))
    assert result.outcome == "learned by heart" and result.best_step == 0
    assert "never fell by more than chance" in said(result) and "at most 100 steps" in said(result)


def similarity(fit: float, count: int, seed: int) -> Tensor:
    draw = np.random.default_rng(seed)
    hubs = draw.normal(size=count)  # captions that every picture likes
    return torch.tensor(0.2 + 0.02 * (draw.normal(size=(count, count)) + hubs + fit * np.eye(count)))


def test_clip_decides_on_captions():
    """With it a small set suffices; it accuses shuffled captions, and acquits those that the losses do not know of."""
    small = Run(train=9, held_out=3, pictures=9, words=(0.0, 0.05))
    shuffled = [verdict(replace(small.curves(i), similarity=similarity(0.0, 12, i))).captions for i in SEEDS]
    assert shuffled.count("do not fit") >= 0.9 * len(SEEDS)
    fitting = [verdict(replace(small.curves(i), similarity=similarity(2.0, 12, i))).captions for i in SEEDS]
    assert fitting.count("do not fit") <= 0.02 * len(SEEDS) and fitting.count("fit") >= 0.95 * len(SEEDS)
    assert verdict(small.curves(0)).captions != "do not fit"  # too few by losses alone


def test_captions_that_are_all_alike_cannot_be_judged():
    curves = replace(GOOD.curves(0), similarity=torch.rand(24, 1).expand(24, 24))
    same = replace(curves, train_swapped=curves.train, held_out_swapped=curves.held_out)
    found = figures(same)
    assert found.told_at_start is found.told_at_best is found.clip is None
    assert verdict(same).captions == "not known"


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        (
            Run(gain=0.006, heart=0.04, speed=2.0, wobble=0.03),
            "Train for longer, or hold out more pictures than 8, and it can be said.",
        ),
        (
            Run(gain=0.03, heart=0.02, held_out=0),
            "With 20 pictures or more, and a fifth of them held out, it can be said.",
        ),
    ],
    ids=["too little gained", "none held out"],
)
def test_where_it_cannot_be_said_the_advice_is_what_is_lacking(run: Run, advice: str):
    said = [found for seed in SEEDS if (found := verdict(run.curves(seed))).outcome == "not known"]
    assert {found.advice for found in said} == {("Judge by the samples.", advice)}


def test_clip_ranks_by_counting():
    cosines = similarity(1.0, 9, 0)
    found = figures(replace(GOOD.curves(0), similarity=cosines))
    likes = cosines.numpy() - cosines.numpy().mean(axis=0)
    before = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(likes)]
    assert found.clip is not None
    assert found.clip.value == pytest.approx(0.5 - (np.mean(before) + 0.5) / 9)
    assert found.recall == pytest.approx(np.mean([b == 0 for b in before]))
    places = [(b + 0.5) / 9 for b in range(9)]
    assert found.clip.error == pytest.approx(np.std(places) / 3)  # of nine independent uniform places


@settings(max_examples=25, deadline=None)
@given(
    scale=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
    run=st.sampled_from([GOOD, FROZEN, OVERFITTED, SHORT, SHUFFLED, WORSE]),
)
def test_units_and_order_do_not_matter(scale, order, run):
    """Each timestep's losses in units of its own, the pictures in any order."""
    curves = run.curves(0)
    train, held_out = list(range(run.train)), list(range(run.held_out))
    order.shuffle(train)
    order.shuffle(held_out)
    units = torch.tensor(scale, dtype=torch.float64)
    other = replace(
        curves,
        train=curves.train[:, train] * units,
        train_swapped=curves.train_swapped[:, train] * units,
        held_out=curves.held_out[:, held_out] * units,
        held_out_swapped=curves.held_out_swapped[:, held_out] * units,
    )
    one, two = verdict(curves), verdict(other)
    assert (one.outcome, one.best_step, one.gap_step, one.captions) == (
        two.outcome, two.best_step, two.gap_step, two.captions,
    )  # fmt: skip
    assert two.figures.train_fall.value == pytest.approx(one.figures.train_fall.value, rel=1e-6, abs=1e-9)


def test_curves_are_checked():
    curves = GOOD.curves(0)
    with pytest.raises(LdmError, match="expected 0 and then"):
        replace(curves, steps=curves.steps + 1)
    with pytest.raises(LdmError, match=r"held_out: \(11, 7, 5\)"):
        replace(curves, held_out=curves.held_out[:, 1:])
    with pytest.raises(LdmError, match="logged"):
        replace(curves, rates=curves.rates[1:])


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 100])
def test_student(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.99, freedom), rel=0.02)
    assert student(0) == math.inf


def test_estimates_against_scipy():
    """A mean is above chance exactly where a one-sided t test at 1% says so; two means, only where Welch's does."""
    draw = np.random.default_rng(0)
    for shift in np.linspace(0.0, 0.8, 30):
        rows = draw.normal(shift, 1, size=(12, 5)).mean(axis=1)
        found = mean(torch.tensor(rows)[:, None])
        assert found.error == pytest.approx(stats.sem(rows))
        assert found.above() == (_chance(stats.ttest_1samp(rows, 0, alternative="greater")) < 0.01)
        others = draw.normal(0, 1, size=5)
        difference = found - mean(torch.tensor(others)[:, None])
        if difference.above():
            assert _chance(stats.ttest_ind(rows, others, equal_var=False, alternative="greater")) < 0.01
    few = mean(torch.tensor([[1.0, 2.0], [4.0, 5.0]]))  # all four cells
    assert (few.value, few.freedom) == (3.0, 3) and few.error == pytest.approx(stats.sem([1, 2, 4, 5]))
    assert mean(torch.tensor([[1.0]])) == Estimate(1.0, math.inf, 0) and not mean(torch.tensor([[9.0]])).above()


def _chance(test: Any) -> float:
    return test.pvalue


@pytest.mark.parametrize(("epochs", "said"), [(4.0, "4.0"), (667.0, "667"), (4000 / 3, "1,333")])
def test_how_often_each_was_seen_is_said_in_plain_numbers(epochs, said):
    sentences = verdict(replace(FOUR, epochs=epochs).curves(0)).sentences
    assert f"each was seen {said} times" in sentences[0]

"""Which pictures a micro-batch is of: against what an epoch is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.training.tune.epochs import epochs_of

PICTURES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=12)


def epochs(pictures: list[tuple[str, int]], batch: int, seed: int = 0):
    buckets, repeats = zip(*pictures, strict=True)
    return epochs_of(buckets, repeats, [False] * len(pictures), batch, seed)


@settings(max_examples=50, deadline=None)
@given(PICTURES, st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_shows_each_picture_as_often_as_it_is_repeated(pictures, batch, epoch):
    chosen = epochs(pictures, batch)
    batches = [chosen.pictures(epoch * len(chosen) + n) for n in range(len(chosen))]
    assert all(len(row) == batch and len({pictures[i][0] for i in row}) == 1 for row in batches)
    shown = Counter(i for row in batches for i in row)
    assert all(shown[i] >= repeats for i, (_, repeats) in enumerate(pictures))
    filled = sum(shown.values()) - sum(repeats for _, repeats in pictures)
    assert 0 <= filled <= (batch - 1) * len({bucket for bucket, _ in pictures})


def test_epochs_differ_and_a_number_does_not():
    one = epochs([("a", 1)] * 20, 4)
    assert [one.pictures(n) for n in range(5)] != [one.pictures(n) for n in range(5, 10)]
    again = epochs([("a", 1)] * 20, 4)
    assert [one.pictures(n) for n in reversed(range(30))] == [again.pictures(n) for n in range(30)][::-1]
    assert [one.pictures(n) for n in range(5)] != [epochs([("a", 1)] * 20, 4, seed=1).pictures(n) for n in range(5)]


@pytest.mark.parametrize(("own", "others"), [(12, 5), (3, 40), (7, 7)])
def test_pictures_of_the_class_are_shown_as_often_as_the_subject(own, others):
    regular = [False] * own + [True] * others
    chosen = epochs_of(["a"] * (own + others), [1] * (own + others), regular, 1, 0)
    shown = Counter(regular[chosen.pictures(n)[0]] for n in range(len(chosen)))
    assert shown[True] == shown[False] == own
    each = Counter(chosen.pictures(n)[0] for n in range(len(chosen)))
    spread = [each[i] for i in range(own, own + others)]
    assert max(spread) - min(spread) <= 1

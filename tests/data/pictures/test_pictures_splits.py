from __future__ import annotations

import itertools
from collections import Counter

import pytest

from ldm.data.pictures.splits import choose_concepts, left_out
from ldm.data.pictures.words import content_words


@pytest.mark.parametrize("share", [0.06, 0.5])
def test_the_share_left_out_is_the_share_asked_for(share: float) -> None:
    number = 20000
    found = sum(left_out(share, "bg", i, "red") for i in range(number))
    assert found == pytest.approx(share * number, abs=4 * (share * (1 - share) * number) ** 0.5)


def test_the_same_names_are_always_left_out_together() -> None:
    assert left_out(0.5, "ct", "1f34e", 3) == left_out(0.5, "ct", "1f34e", "3")
    assert any(left_out(0.5, "ct", a, b) != left_out(0.5, "ct", b, a) for a, b in itertools.combinations(range(9), 2))


def test_left_out_concepts_can_be_guessed_from_their_words() -> None:
    colors, things = ("red", "blue", "green", "white"), ("heart", "book", "square", "circle", "apple", "car")
    labels = {f"{color}-{thing}": f"{color} {thing}" for color in colors for thing in things}
    labels |= {"tiger": "tiger", "odd": "singular thing"}
    chosen = choose_concepts(labels)
    assert len(chosen) == 1  # 3.5% of 26
    assert chosen.isdisjoint({"tiger", "odd"})
    kept = Counter(word for code, label in labels.items() if code not in chosen for word in content_words(label))
    assert all(kept[word] >= 2 for code in chosen for word in content_words(labels[code]))
    assert choose_concepts(labels) == chosen

"""Captions as told: by the rules of kohya's sd-scripts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import CaptionRules, told
from ldm.errors import LdmError

TAGS = st.lists(st.text("abcdefg xyz", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=8)


def many(captions: list[str], rules: CaptionRules, count: int = 2000) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    return [told(captions, rules, generator) for _ in range(count)]


def tags_of(text: str) -> list[str]:
    return [tag for tag in text.split(", ") if tag]


@given(TAGS, st.integers(0, 9), st.booleans(), st.floats(0, 1), st.integers(0, 2**31))
def test_kept_tags_stay_and_none_is_made_up(tags: list[str], keep: int, shuffle: bool, drop_tags: float, seed: int):
    rules = CaptionRules(shuffle=shuffle, keep=keep, drop_tags=drop_tags)
    found = tags_of(told([", ".join(tags)], rules, torch.Generator().manual_seed(seed)))
    assert found[:keep] == tags[:keep]
    assert not Counter(found) - Counter(tags)
    if not drop_tags:
        assert Counter(found) == Counter(tags)
    if not shuffle:
        rest = iter(tags)
        assert all(tag in rest for tag in found)  # a sub-sequence


@given(st.text(max_size=30), st.integers(0, 2**31))
def test_without_rules_the_caption_is_untouched(caption: str, seed: int):
    assert told([caption], CaptionRules(), torch.Generator().manual_seed(seed)) == caption


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rates(rate: float):
    """Within four standard deviations of a binomial count."""
    allowed = 4 * (2000 * rate * (1 - rate)) ** 0.5
    whole = many(["a, b, c"], CaptionRules(prefix="sks", drop=rate))
    assert abs(whole.count("") - 2000 * rate) <= allowed
    assert set(whole) <= {"", "sks a, b, c"}
    tags = many(["a, b, c"], CaptionRules(keep=1, drop_tags=rate))
    for tag in "bc":
        assert abs(sum(tag not in text for text in tags) - 2000 * rate) <= allowed
    assert all(text.startswith("a") for text in tags)


def test_every_order_is_as_likely():
    orders = Counter(many(["x, a, b, c"], CaptionRules(shuffle=True, keep=1), 6000))
    assert len(orders) == 6
    assert all(abs(count - 1000) < 4 * (6000 / 6 * 5 / 6) ** 0.5 for count in orders.values())


def test_captions_and_wildcards_are_drawn():
    rules = CaptionRules(wildcards=True)
    assert set(many(["one", "two"], rules, 60)) == {"one", "two"}
    assert set(many(["a {red|green|} cat {{not|this}}"], rules, 100)) == {
        f"a {color} cat {{not|this}}" for color in ("red", "green", "")
    }
    assert told(["a {b|c}"], CaptionRules(), torch.Generator()) == "a {b|c}"


def test_prefix_suffix_and_separator():
    rules = CaptionRules(prefix="p;", suffix=";s", separator=";", shuffle=True, keep=1)
    assert {tuple(sorted(text.split("; "))) for text in many(["a;b"], rules, 50)} == {("a", "b", "p", "s")}
    assert all(text.startswith("p; ") for text in many(["a;b"], rules, 50))
    assert told([""], CaptionRules(prefix="p"), torch.Generator()) == "p"


@given(st.booleans(), st.booleans(), st.floats(0, 1), st.integers(0, 99))
def test_the_generator_moves_by_one_number_whatever_the_rules(shuffle: bool, wildcards: bool, drop: float, seed: int):
    one, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    told(["a, {b|c}, d", "e"], CaptionRules(shuffle=shuffle, wildcards=wildcards, drop=drop, drop_tags=drop), one)
    told(["x"], CaptionRules(), other)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("wrong", [{"drop": 1.5}, {"drop_tags": -0.1}, {"keep": -1}, {"separator": ""}])
def test_wrong_rules(wrong: dict):
    with pytest.raises(LdmError, match=f"captions: {next(iter(wrong))} is"):
        CaptionRules(**wrong)

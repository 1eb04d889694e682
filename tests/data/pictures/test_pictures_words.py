from __future__ import annotations

import pytest

from ldm.data.pictures.words import an, content_words, listing, phrase, plural, slug, without_article


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple", "an apple"),
        ("red apple", "a red apple"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("euro banknote", "a euro banknote"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("hourglass done", "an hourglass done"),
        ("x-ray", "an x-ray"),
        ("house", "a house"),
        ("orange heart", "an orange heart"),
    ],
)
def test_the_article_follows_the_sound(text: str, expected: str) -> None:
    assert an(text) == expected
    assert without_article(expected) == text


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("grapes", "grapes"),
        ("ear of corn", "an ear of corn"),
        ("cooked rice", "cooked rice"),
        ("glass of milk", "a glass of milk"),
        ("octopus", "an octopus"),
        ("tennis", "a tennis"),
        ("women holding hands", "women holding hands"),
        ("women\u2019s room", "a women's room"),
        ("roll of paper", "a roll of paper"),
        ("toilet paper", "toilet paper"),
        ("man: red hair", "a man with red hair"),
        ("man: red hair, beard", "a man with red hair and beard"),
        ("woman: bald", "a bald woman"),
        ("man: beard", "a man with a beard"),
        ("woman running: facing right", "a woman running facing right"),
        ("waving hand: medium-dark skin tone", "a waving hand with medium-dark skin"),
        ("family: man, woman, girl, boy", "a family of a man, a woman, a girl and a boy"),
        ("two-thirty", "a clock showing two-thirty"),
        ("eight o\u2019clock", "a clock showing eight o'clock"),
        ("\u201con\u201d arrow", "an on arrow"),
        ("Statue of Liberty", "Statue of Liberty"),
        ("Santa Claus: dark skin tone", "Santa Claus with dark skin"),
        ("T-Rex", "a t-rex"),
    ],
)
def test_names_become_noun_phrases(label: str, expected: str) -> None:
    assert phrase(label) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "cats"),
        ("computer mouse", "computer mice"),
        ("fox", "foxes"),
        ("peach", "peaches"),
        ("bus", "buses"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("wolf", "wolves"),
        ("tomato", "tomatoes"),
        ("kangaroo", "kangaroos"),
        ("tropical fish", "tropical fish"),
    ],
)
def test_plurals(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("items", "expected"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_listing(items: list[str], expected: str) -> None:
    assert listing(items) == expected


def test_words_of_a_name() -> None:
    assert content_words("Person with Blue cap, 2 arrows") == ["blue", "cap", "2", "arrows"]
    assert slug("Women\u2019s room \u201cA\u201d") == "womens-room-a"

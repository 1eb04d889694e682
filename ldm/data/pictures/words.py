"""From the names that artists and Unicode give to drawings to the words that people type.

The names are those of Unicode CLDR ("man: red hair", "waving hand: dark skin tone", "two-thirty"); captions need noun
phrases ("a man with red hair", "a waving hand with dark skin", "a clock showing two-thirty") and plurals ("mice").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

_PLURAL = """
    grapes glasses sunglasses goggles jeans shorts scissors chopsticks fireworks sparkles cherries eyes ears hands feet
    footprints skis books people women men peanuts beans lungs shoes headphones binoculars dice dominoes sushi hearts
    leaves lips teeth bubbles notes masts arrows bars beads pills socks gloves olives slippers paperclips tools swords
    mugs flags dolls twins mountains tickets bags cards fingers droplets hotsprings wheels papers waves
"""
_MASS = """
    bread rice honey milk bacon soap salt butter garlic ice wood ramen spaghetti popcorn money fog fire soccer broccoli
    corn lacrosse mahjong moon meat sake cooking falafel fondue oden tofu yarn thread luggage jewelry steam water
    confetti lipstick fries
"""
PLURAL_NOUNS = frozenset(_PLURAL.split())
MASS_NOUNS = frozenset(_MASS.split()) | {"toilet paper", "ginger root"}
PROPER_NAMES = {"Mount", "Mrs.", "Santa", "Statue", "Japan", "Saturn", "Tokyo", "Mx"}
GROUPS_OF_PEOPLE = {"women", "men", "people", "two", "children"}
SINGULAR_IN_S = ("ss", "us", "is", "ops", "os", "lens", "canvas", "christmas", "'s")
"""Endings of nouns that are singular although they end in s."""

IRREGULAR_PLURALS = {
    "mouse": "mice", "foot": "feet", "man": "men", "woman": "women", "person": "people", "child": "children",
    "goose": "geese", "fish": "fish", "sheep": "sheep", "deer": "deer", "leaf": "leaves", "wolf": "wolves",
    "knife": "knives", "shrimp": "shrimp", "squid": "squid", "bison": "bison", "ox": "oxen", "tooth": "teeth",
    "loaf": "loaves", "moose": "moose", "cactus": "cacti", "scarf": "scarves", "tomato": "tomatoes",
    "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes", "mosquito": "mosquitoes", "hero": "heroes",
}  # fmt: skip

SKIN_TONE = re.compile(r":?\s*(light|medium-light|medium|medium-dark|dark) skin tone")
PREPOSITION = re.compile(r" (?:with|of|on|in|and|for|from|facing|showing|without|over|to|at) ")
FUNCTION_WORDS = {
    "a", "an", "the", "of", "with", "and", "in", "on", "for", "to", "over", "without", "at", "from", "person",
}  # fmt: skip

SOUNDS_LIKE_A_CONSONANT = ("uni", "eu", "one", "once", "use", "ukulele", "ut")
SOUNDS_LIKE_A_VOWEL = {"hour", "hourglass", "x-ray", "honest", "o", "sos", "mp3"}


def an(text: str) -> str:
    """Put the indefinite article before a phrase, by the sound of its first word."""
    word = text.split()[0].lower()
    vowel = word[0] in "aeiou" and not word.startswith(SOUNDS_LIKE_A_CONSONANT)
    return ("an " if vowel or word in SOUNDS_LIKE_A_VOWEL else "a ") + text


def without_article(text: str) -> str:
    """The phrase without a leading "a" or "an"."""
    return re.sub(r"^an? ", "", text)


def is_singular(text: str) -> bool:
    """Whether a phrase made by `phrase` starts with an indefinite article."""
    return re.match(r"an? ", text) is not None


def listing(items: Sequence[str]) -> str:
    """Join as in a sentence: "a", "a and b", "a, b and c"."""
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def phrase(label: str) -> str:
    """A CLDR name as a noun phrase with its article, in lower case unless it is a proper name."""
    text, tone = _take_skin_tone(_plain_quotes(label))
    text = re.sub(r":\s*facing right", " facing right", text)
    text = _unfold_members(_unfold_person(text))
    if text.endswith(("o'clock", "-thirty")):
        return "a clock showing " + text.lower()
    text = re.sub(r"^(the|a|an) ", "", text)
    if text.split()[0] in PROPER_NAMES:
        return text + tone
    return ((text if _takes_no_article(text) else an(text)) + tone).lower()


def plural(noun: str) -> str:
    """The plural of a noun or noun phrase whose last word is its head: "computer mouse" -> "computer mice"."""
    *before, last = noun.split()
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def content_words(text: str) -> list[str]:
    """The words of a name that carry its meaning, lower case."""
    return [word for word in re.findall(r"[a-z0-9']+", text.lower()) if word not in FUNCTION_WORDS]


def slug(text: str) -> str:
    """A name as icon sets spell it: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", _plain_quotes(text).lower().replace("'", "")).strip("-")


def _plain_quotes(label: str) -> str:
    """Straight apostrophes, and no curly quotation marks."""
    return label.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").strip()


def _take_skin_tone(text: str) -> tuple[str, str]:
    """Split "waving hand: dark skin tone" into "waving hand" and " with dark skin"."""
    tone = SKIN_TONE.search(text)
    if tone is None:
        return text, ""
    return text.replace(tone.group(0), "").strip(" :,"), f" with {tone.group(1)} skin"


def _unfold_person(text: str) -> str:
    """As in "man: red hair, beard" -> "man with red hair and beard"."""
    match = re.match(r"^(woman|man|person): (.+)$", text)
    if match is None:
        return text
    who, traits = match.groups()
    special = {"bald": f"bald {who}", "beard": f"{who} with a beard"}
    return special.get(traits) or f"{who} with {traits.replace(', ', ' and ')}"


def _unfold_members(text: str) -> str:
    """As in "family: man, woman" -> "family of a man and a woman"."""
    match = re.match(r"^([a-z ]+): (.+)$", text)
    if match is None:
        return text
    head, members = match.groups()
    return f"{head} of {listing([an(member) for member in members.split(', ')])}"


def _takes_no_article(text: str) -> bool:
    head = PREPOSITION.split(text)[0]
    last = head.split()[-1].lower()
    if text.split()[0] in GROUPS_OF_PEOPLE or last in MASS_NOUNS | PLURAL_NOUNS or {head, text} & MASS_NOUNS:
        return True
    return last.endswith("s") and not last.endswith(SINGULAR_IN_S)

"""What is left out of training, to measure what the model has understood rather than remembered.

- `test_concept`: a concept that no style shows in training, all of whose words occur in others ("blue heart").
- `test_pair`: a known concept in a style it is never drawn in.
- `test_attr`: a combination of attributes, such as the colour and the eyes of a robot, or a figure and its ground.
- `test_comp`: a pair of objects, a count, a ground, a recolouring, a landscape with this object.
- `heldout_style`: every picture of one style, kept for fine-tuning.

A hash of the names decides, so a picture's split depends on neither order nor chance.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from random import Random

from ldm.data.pictures.words import content_words

TRAIN = "train"
HELD_OUT_CONCEPT = "test_concept"
HELD_OUT_PAIR = "test_pair"
HELD_OUT_ATTRIBUTES = "test_attr"
HELD_OUT_COMPOSITION = "test_comp"
HELD_OUT_STYLE = "heldout_style"

CONCEPT_SHARE = 0.035
CONCEPT_SEED = 11
COMMON = 3
"""A word must occur in so many concepts, counting the one left out, for that one to be guessed from its words."""


def left_out(share: float, *names: object) -> bool:
    """Whether this combination of names is among the `share` (0 to 1) of all that training never sees."""
    digest = hashlib.sha256("|".join(map(str, names)).encode()).hexdigest()
    return int(digest[:12], 16) / 16**12 < share


def choose_concepts(labels: Mapping[str, str]) -> set[str]:
    """The codes of the concepts to leave out in every style, given the label of each code in order.

    Each has two or more words, and each of its words still occurs in two other concepts that stay.
    """
    left = Counter(word for label in labels.values() for word in set(content_words(label)))
    candidates = [code for code, label in labels.items() if len(content_words(label)) >= 2 and _known(label, left)]
    Random(CONCEPT_SEED).shuffle(candidates)
    chosen: set[str] = set()
    for code in candidates:
        if len(chosen) >= CONCEPT_SHARE * len(labels):
            break
        if _known(labels[code], left):
            chosen.add(code)
            left.subtract(set(content_words(labels[code])))
    return chosen


def _known(label: str, counts: Counter[str]) -> bool:
    return all(counts[word] >= COMMON for word in content_words(label))

"""What is known of a picture besides its pixels, and what may be read off its captions."""

from __future__ import annotations

import re
from typing import Any

Record = dict[str, Any]
"""One picture's captions `texts`, and those of the other RECORD_FIELDS that it has."""

RECORD_FIELDS = ("texts", "kind", "style", "set", "key", "concept", "label", "split")

KIND_SHARES = {
    "emoji": 0.40,
    "silhouette": 0.07,
    "parametric": 0.18,
    "background": 0.08,
    "recolor": 0.07,
    "pair": 0.08,
    "count": 0.04,
    "scene": 0.05,
    "shapes": 0.03,
}
"""How much of training, and of a sheet of samples, each kind of picture takes."""

_ONE_SIDED = re.compile(
    r"\b("
    r"left|right|leftwards?|rightwards?|west|east|clockwise|counterclockwise|anticlockwise"  # sides and senses
    r"|arrows?|clocks?|clock-face|o'clock|thirty|watch|stopwatch|calendar"  # hands and dates
    r"|texts?|letters?|words?|latin|abcd?|alphabet|numbers?|numerals?|digits?|keycap|button|hundred points"  # writing
    r"|symbols?|marks?|atm|banknote|currency|newspaper|musical|notes?|clef|zodiac|keyboard|8 ball"
    r"|waxing|waning|quarter"  # phases of the moon, told apart by their lit side
    r")\b"
)


def may_flip(record: Record) -> bool:
    """Whether the mirror image fits the same captions: none speaks of sides, writing, arrows, clocks or moon phases."""
    label = record.get("label") or []
    labels = [label] if isinstance(label, str) else label
    return not any(_ONE_SIDED.search(text.lower()) for text in [*record["texts"], *labels])

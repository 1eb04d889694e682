"""What a picture's caption is told as, each time that the picture is shown.

The order of the steps, and their names on the right, are those of kohya's sd-scripts, whose users have their habits:
prefix and suffix, `caption_dropout_rate`, `enable_wildcard`, then tag by tag `keep_tokens`, `shuffle_caption` and
`caption_tag_dropout_rate`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Generator

_CHOICES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class CaptionRules:
    """How captions are varied.

    shuffle: tags in a new order each time
    keep: so many tags at the beginning stay there, and are never dropped
    separator: between the tags of a caption
    prefix, suffix: joined to it by a space; tags of theirs count as the caption's
    drop: the chance, 0 to 1, that the whole caption is left empty, which guidance needs
    drop_tags: the chance that a tag is left out
    wildcards: of a caption file with several lines one is drawn, and {a|b} is a or b; {{ and }} are braces
    """

    shuffle: bool = False
    keep: int = 0
    separator: str = ","
    prefix: str = ""
    suffix: str = ""
    drop: float = 0.0
    drop_tags: float = 0.0
    wildcards: bool = False

    def __post_init__(self) -> None:
        for name in ("drop", "drop_tags"):
            if not 0 <= getattr(self, name) <= 1:
                raise LdmError(f"captions: {name} is {getattr(self, name)}, expected a chance from 0 to 1")
        if self.keep < 0:
            raise LdmError(f"captions: keep is {self.keep}, expected 0 tags or more")
        if not self.separator:
            raise LdmError("captions: separator is empty, expected one as ','")


def whole(caption: str, rules: CaptionRules) -> str:
    """The caption between its prefix and its suffix."""
    return " ".join(filter(None, (rules.prefix, caption, rules.suffix)))


def told(captions: Sequence[str], rules: CaptionRules, generator: Generator) -> str:
    """One of a picture's captions, varied by the rules.

    Whatever the rules are, one number is drawn from the generator: all else depends on it alone.
    """
    import torch  # here, since who only checks a folder does not need it

    chance = Random(int(torch.randint(2**62, (), generator=generator)))
    caption = whole(chance.choice(captions), rules)
    if chance.random() < rules.drop:
        return ""
    if rules.wildcards:
        caption = _CHOICES.sub(lambda found: _chosen(found, chance), caption)
    if not rules.shuffle and not rules.drop_tags:
        return caption
    tags = [tag.strip() for tag in caption.split(rules.separator) if tag.strip()]
    kept, free = tags[: rules.keep], tags[rules.keep :]
    if rules.shuffle:
        chance.shuffle(free)
    return f"{rules.separator} ".join([*kept, *(tag for tag in free if chance.random() >= rules.drop_tags)])


def _chosen(found: re.Match[str], chance: Random) -> str:
    return found[0][0] if found[1] is None else chance.choice(found[1].split("|"))

"""The records of a set of pictures to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data.captions import CaptionRules
from ldm.data.file_at import BytesAt
from ldm.data.records import may_flip
from ldm.errors import LdmError


@dataclass(frozen=True)
class Example:
    """A picture with its captions, and how it is shown. Nothing of it is decoded yet.

    name: where it lies, below the root of its set
    captions: one at least, and one may be empty
    repeats: how often an epoch shows it
    flip, random_crop: whether it may be mirrored, and cut elsewhere than in its middle
    mask: white is what the loss looks at
    hint: the picture that a ControlNet is told
    regular: of the class and not of the subject (DreamBooth's prior preservation)
    """

    name: str
    image: BytesAt
    captions: tuple[str, ...]
    rules: CaptionRules
    repeats: int = 1
    flip: bool = False
    random_crop: bool = False
    mask: BytesAt | None = None
    hint: BytesAt | None = None
    regular: bool = False


@dataclass(frozen=True)
class PictureSet:
    """What was found.

    left_out: a line for each picture, caption or shard that is not taken: its name, and why
    notes: what else one should know
    """

    root: Path
    examples: tuple[Example, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Defaults:
    """What holds where a data set does not say otherwise.

    class_tokens: the caption of pictures that have none; without it they are left out, "" shows them with none
    caption_suffix: the ending of caption files, as .caption; without it .txt, .caption and .json are looked for
    masks, hints: folders with pictures of the same names; a picture without a mask counts as a whole, one without a
                  hint is left out
    regular: a folder with pictures of the class (DreamBooth), regular_tokens their caption where they have none
    """

    rules: CaptionRules = field(default_factory=CaptionRules)
    repeats: int = 1
    flip: bool = False
    random_crop: bool = False
    class_tokens: str | None = None
    caption_suffix: str = ""
    masks: Path | None = None
    hints: Path | None = None
    regular: Path | None = None
    regular_tokens: str | None = None


def joined(root: Path, parts: Sequence[PictureSet]) -> PictureSet:
    """Several sets as one."""
    return PictureSet(
        root,
        tuple(example for part in parts for example in part.examples),
        tuple(line for part in parts for line in part.left_out),
        tuple(line for part in parts for line in part.notes),
    )


def example_of(
    name: str,
    image: BytesAt,
    captions: tuple[str, ...],
    defaults: Defaults,
    *,
    mask: BytesAt | None = None,
    hint: BytesAt | None = None,
) -> Example:
    """A picture with what the defaults say of it; it may be mirrored only where its captions speak of no side.

    Raises LdmError, without its name, where it has no caption and there is none for all.
    """
    if not captions:
        if defaults.class_tokens is None:
            raise LdmError("no caption; write one beside it, or give class tokens for all that have none")
        captions = (defaults.class_tokens,)
    flip = defaults.flip and may_flip({"texts": list(captions)})
    return Example(name, image, captions, defaults.rules, defaults.repeats, flip, defaults.random_crop, mask, hint)

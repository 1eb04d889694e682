"""What is wrong or doubtful about a set of pictures, before anything is trained on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.buckets import Buckets, Crop
from ldm.data.captions import whole
from ldm.data.example import Example, PictureSet
from ldm.data.look import Look
from ldm.errors import LdmError

ENLARGED = 2.0
"""A picture is tiny where it is scaled up by more."""

KEPT = 0.6
"""A picture is too long where less of it lies within its crop."""

NEAR_BITS, NEAR_LEVELS = 8, 20
"""Pictures are alike where so many of the hash's 64 bits differ at most, and no field's color by more levels.

Tried on photographs: they are found shrunk to half, as poor JPEG, and with a hundredth cut off each side.
"""

_BITS = np.array([number.bit_count() for number in range(2**16)], np.uint8)
"""How many bits are set: of 16 at a time."""

TOKENS = 75
"""What CLIP's text encoders read of a caption."""


@dataclass(frozen=True)
class Seen:
    """A picture as it will be trained on. tokens: of its longest caption; faults: what one should see to."""

    name: str
    captions: tuple[str, ...]
    crop: Crop
    repeats: int
    regular: bool
    masked: bool
    tokens: int | None
    faults: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class BucketCount:
    """A bucket in use. shown: its pictures with their repeats."""

    width: int
    height: int
    pictures: int
    shown: int


@dataclass(frozen=True)
class Checked:
    """What was found.

    pictures: all that can be used, in their order
    duplicates, alike: groups of names with the same bytes, and of those that look nearly the same
    tiny, long, wordy, uncaptioned: names of pictures that are much enlarged, cut to less than KEPT, have a caption
                                    that is cut, and have none
    """

    root: str
    pictures: tuple[Seen, ...]
    buckets: tuple[BucketCount, ...]
    duplicates: tuple[tuple[str, ...], ...]
    alike: tuple[tuple[str, ...], ...]
    tiny: tuple[str, ...]
    long: tuple[str, ...]
    wordy: tuple[str, ...]
    uncaptioned: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def shown(self) -> int:
        """Pictures of an epoch, repeats counted, those of the class apart."""
        return sum(seen.repeats for seen in self.pictures if not seen.regular)


def check(
    pictures: PictureSet, looks: Sequence[Look], buckets: Buckets, count_tokens: Callable[[str], int] | None = None
) -> Checked:
    """Judge a set that was examined (`ldm.data.look.examine`).

    count_tokens: how many tokens a caption has, without those for its start and end
    """
    names = [example.name for example in pictures.examples]
    duplicates = _same(names, looks)
    alike = _alike(names, looks)
    twins = {name: f"the same file as {_others(name, group)}" for group in duplicates for name in group}
    twins |= {name: f"looks like {_others(name, group)}" for group in alike for name in group if name not in twins}
    kinds: dict[str, list[str]] = defaultdict(list)
    seen, left_out = [], list(pictures.left_out)
    for example, look in zip(pictures.examples, looks, strict=True):
        try:
            crop = buckets.crop(*look.size)
        except LdmError as error:
            left_out.append(f"{example.name}: {error}")
            continue
        tokens = max(map(count_tokens, _texts(example))) if count_tokens else None
        faults = list(_faults(example, crop, tokens, kinds))
        faults += [twins[example.name]] if example.name in twins else []
        seen.append(
            Seen(
                example.name,
                example.captions,
                crop,
                example.repeats,
                example.regular,
                example.mask is not None,
                tokens,
                tuple(faults),
                look.remarks,
            )
        )
    return Checked(
        str(pictures.root),
        tuple(seen),
        _counted(seen),
        duplicates,
        alike,
        tuple(kinds["tiny"]),
        tuple(kinds["long"]),
        tuple(kinds["wordy"]),
        tuple(kinds["uncaptioned"]),
        tuple(left_out),
        pictures.notes,
    )


def _texts(example: Example) -> list[str]:
    return [whole(caption, example.rules) for caption in example.captions]


def _faults(example: Example, crop: Crop, tokens: int | None, kinds: dict[str, list[str]]) -> list[str]:
    faults = []

    def found(kind: str, what: str) -> None:
        kinds[kind].append(example.name)
        faults.append(what)

    enlarged = crop.scaled[0] / crop.original[0]
    if enlarged > ENLARGED:
        found("tiny", f"tiny: enlarged {enlarged:.3g} times")
    if crop.kept < KEPT:
        found("long", f"{_aspect(crop)}: {crop.kept:.0%} of it is kept")
    if tokens is not None and tokens > TOKENS:
        found("wordy", f"caption of {tokens} tokens: cut after {TOKENS}")
    if not all(caption.strip() for caption in example.captions):
        found("uncaptioned", "no caption")
    return faults


def _aspect(crop: Crop) -> str:
    width, height = crop.original
    return f"wide, {width / height:.3g} to 1" if width > height else f"tall, 1 to {height / width:.3g}"


def _counted(seen: Sequence[Seen]) -> tuple[BucketCount, ...]:
    pictures = Counter(one.crop.bucket for one in seen)
    shown: Counter[tuple[int, int]] = Counter()
    for one in seen:
        shown[one.crop.bucket] += one.repeats
    return tuple(BucketCount(*size, pictures[size], shown[size]) for size in sorted(pictures))


def _others(name: str, group: Sequence[str]) -> str:
    others = [other for other in group if other != name] or list(group[:1])
    return others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "")


def _same(names: Sequence[str], looks: Sequence[Look]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, look in zip(names, looks, strict=True):
        groups[look.digest].append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _alike(names: Sequence[str], looks: Sequence[Look]) -> tuple[tuple[str, ...], ...]:
    """Groups of pictures linked by likeness; of those whose files are the same, only the first."""
    first = {look.digest: number for number, look in reversed(list(enumerate(looks)))}
    numbers = sorted(first.values())
    shapes = np.array([looks[number].shape for number in numbers], np.uint64)
    colors = np.array([looks[number].colors for number in numbers], np.int16)
    leader = {number: number for number in numbers}

    def leads(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    for place, number in enumerate(numbers):
        differing = (shapes[place + 1 :] ^ shapes[place]).view(np.uint16).reshape(-1, 4)
        near = place + 1 + np.flatnonzero(_BITS[differing].sum(axis=1) <= NEAR_BITS)
        near = near[(np.abs(colors[near] - colors[place]) <= NEAR_LEVELS).all(axis=1)]
        for other in near:
            leader[leads(numbers[other])] = leads(number)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in sorted(leader):
        groups[leads(number)].append(number)
    return tuple(tuple(names[number] for number in group) for group in groups.values() if len(group) > 1)

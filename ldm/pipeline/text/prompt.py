r"""The language of prompts: adapters by name, parts that are drawn together, changes from step to step; weights.

AUTOMATIC1111's web UI set the syntax that most shared prompts are written in:

    (word) (word:1.3) [word]           more, by so much, or less attention; nested brackets multiply
    \( \) \[ \] \\                     the sign itself
    BREAK                              a new chunk of tokens
    [from:to:when] [to:when] [from::when]    changes at a step (10), or at a share of the steps (0.5)
    [a|b|c]                            another one at every step
    a :0.7 AND b                       two prompts that guide the same picture, with weights
    <lora:name:0.8>                    an adapter

A prompt is taken apart from the outside in: `adapters_in`, `alternatives`, `schedule_of`, and for the rest
`ldm.pipeline.text.prompt_weights`. Each is a few passes over the text, without recursion: what is no syntax is plain
text. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ldm.errors import LdmError

Emphasis = Literal["a1111", "no-norm", "comfy", "compel", "ignore", "literal"]
"""How weights are written in a prompt, and what they do to the text states (see `ldm.pipeline.text.emphasis`).

a1111:   AUTOMATIC1111's brackets; its "Original" rule, which restores the mean of the states
no-norm: the same brackets; its "No norm" rule, which does not
comfy:   ComfyUI's: round brackets alone, and an explicit number replaces the weight from outside; BREAK is a word
compel:  compel's: word++, word-, (some words)1.3; BREAK is a word
ignore:  AUTOMATIC1111's brackets, without effect
literal: no syntax: brackets are brackets
"""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter that a prompt asks for by name, and its weights for the U-Net and for the text towers."""

    name: str
    weight: float
    text_weight: float


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def finite_number(text: str) -> float | None:
    """A finite number in plain digits, or None."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


_CLOSING = {"(": ")", "[": "]"}
_SCHEDULE = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)


@dataclass(frozen=True)
class _Choice:
    """Square brackets of which one part is shown: the parts as (begin, end) among the tokens, and the closing bracket.

    when: the step from which it is the second of two parts; None: each part has its turn
    """

    parts: tuple[tuple[int, int], ...]
    end: int
    when: int | None

    def part_at(self, step: int) -> tuple[int, int]:
        """What is shown at a step."""
        return self.parts[step % len(self.parts) if self.when is None else int(step >= self.when)]


def schedule_of(text: str, steps: int) -> tuple[tuple[int, str], ...]:
    """A prompt -> (step from which it holds, prompt without [from:to:when] and [a|b]), for `steps` steps from 0 on.

    schedule_of("a [cat:dog:0.5]", 10) == ((0, "a cat"), (5, "a dog"))

    `when` with a point is a share of the steps, without one a step's number. Equal neighbours are one. Brackets that
    do not match are plain text, and so are all that are open around them, as in AUTOMATIC1111's grammar. A | outside of
    square brackets and a backslash at the end are only text; there they keep the whole prompt from being read.
    """
    tokens = _SCHEDULE.findall(text)
    choices = _choices(tokens, steps)
    changes = {0, *(choice.when for choice in choices.values() if choice.when is not None and choice.when < steps)}
    if any(choice.when is None for choice in choices.values()):
        changes.update(range(steps))
    schedule: list[tuple[int, str]] = []
    for step in sorted(changes):
        shown = _text_at(tokens, choices, step)
        if not schedule or schedule[-1][1] != shown:
            schedule.append((step, shown))
    return tuple(schedule)


def _choices(tokens: Sequence[str], steps: int) -> dict[int, _Choice]:
    """The choices of a text by the index of their opening bracket."""
    choices: dict[int, _Choice] = {}
    stack: list[tuple[int, list[int]]] = []  # the brackets that are open, and the separators right inside of them
    for i, token in enumerate(tokens):
        if token in _CLOSING:
            stack.append((i, []))
        elif stack and (token == ":" or (token == "|" and tokens[stack[-1][0]] == "[")):
            stack[-1][1].append(i)
        elif stack and token in _CLOSING.values():
            opened, separators = stack.pop()
            signs = "".join(tokens[separator] for separator in separators)
            choice = _choice(tokens, [opened, *separators, i], signs, steps) if tokens[opened] + token == "[]" else None
            if choice is not None:
                choices[opened] = choice
            elif tokens[opened] + signs + token not in ("()", "(:)", "[]"):
                stack.clear()
    return choices


def _choice(tokens: Sequence[str], bounds: Sequence[int], signs: str, steps: int) -> _Choice | None:
    """What square brackets choose from; None where they only weigh, or are broken. bounds: they and the separators."""
    parts = tuple((begin + 1, end) for begin, end in pairwise(bounds))
    if signs and not signs.strip("|"):
        return _Choice(parts, bounds[-1], None)
    if signs not in (":", "::") or (when := _when(tokens, parts[-1], steps)) is None:
        return None
    nothing = (bounds[-1], bounds[-1])
    return _Choice((parts[0] if signs == "::" else nothing, parts[-2]), bounds[-1], when)


def _when(tokens: Sequence[str], part: tuple[int, int], steps: int) -> int | None:
    """The step that the last part of [from:to:when] names, 0 to steps; None where it is no number."""
    text = "".join(tokens[slice(*part)]).strip()
    if not _NUMBER.fullmatch(text):
        return None
    return int(max(0.0, min(steps, float(text) * steps if "." in text else float(text))))


def _text_at(tokens: Sequence[str], choices: dict[int, _Choice], step: int) -> str:
    """What the prompt reads at a step."""
    shown: list[str] = []
    exits: list[tuple[int, int]] = []  # where the parts that we are in end, and where it goes on from there
    i = 0
    while i < len(tokens) or exits:
        if exits and exits[-1][0] == i:
            i = exits.pop()[1]
        elif choice := choices.get(i):
            i, end = choice.part_at(step)
            exits.append((end, choice.end + 1))
        else:
            shown.append(tokens[i])
            i += 1
    return "".join(shown)


_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def alternatives(text: str) -> tuple[tuple[str, float], ...]:
    """The parts of a prompt that AND divides, each with the weight behind its last colon, else 1 (Liu et al. 2022).

    alternatives("a cat :0.7 AND a dog") == (("a cat", 0.7), (" a dog", 1.0))

    The whole prompt is divided, whatever brackets it is in, as AUTOMATIC1111's is. But where nothing is divided, a
    number at the end is none: "a clock at 10:30" is not thirty times a clock.
    """
    parts = _AND.split(text)
    if len(parts) == 1:
        return ((text, 1.0),)
    return tuple(_with_weight(part) for part in parts)


def _with_weight(part: str) -> tuple[str, float]:
    before, colon, number = part.rpartition(":")
    number = number.strip()
    weight = finite_number(number) if colon and _AND_WEIGHT.fullmatch(number) else None
    return (part.rstrip(), 1.0) if weight is None else (before.rstrip(), weight)


_ADAPTER = re.compile(r"<(?:lora|lyco):([^<>]+)>")


def adapters_in(text: str) -> tuple[str, tuple[NamedAdapter, ...]]:
    """A prompt without its <lora:name:weight>, and these.

    One number is the weight for text towers and U-Net alike; of two, the first is for the towers, the second for the
    U-Net; they may also be given by name, `te=` and `unet=`. Without a number it is 1. So AUTOMATIC1111 reads them.
    Raises `LdmError` where a weight is no number.
    """
    adapters = tuple(_adapter(found[0], found[1].split(":")) for found in _ADAPTER.finditer(text))
    return _ADAPTER.sub("", text), adapters


def _adapter(tag: str, parts: Sequence[str]) -> NamedAdapter:
    places = [part.strip() for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    if not places or not places[0]:
        raise LdmError(f"prompt: {tag!r}: found no name, expected one; write <lora:name:0.8>")
    towers = named.get("te", places[1] if len(places) > 1 else "1")
    unet = named.get("unet", places[2] if len(places) > 2 else towers)
    return NamedAdapter(places[0], _adapter_weight(tag, unet), _adapter_weight(tag, towers))


def _adapter_weight(tag: str, number: str) -> float:
    weight = finite_number(number.strip())
    if weight is None:
        raise LdmError(f"prompt: {tag!r}: found {number!r}, expected a weight, a number; write <lora:name:0.8>")
    return weight

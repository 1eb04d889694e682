"""Prompts that differ from picture to picture: {a|b|c} picks one of these, __name__ a line of name.txt.

    {red|green} {2$$a|b|c}        one of two; two of three, joined by ", "
    {0.5::rare|2::common|usual}   weights, 1 where there is none
    __colour__ __animals/birds__  a line of colour.txt, of animals/birds.txt; lines with # and empty ones do not count

What is picked may hold more of both. The syntax is that of the Dynamic Prompts extension. Nothing here imports torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ldm.errors import LdmError
from ldm.pipeline.text.prompt import finite_number

MAX_PICKS, MAX_TEXT = 1000, 20_000
"""So many choices and characters are not passed: a file that names itself would go on without end."""

MAX_WEIGHT = 1e9
"""A larger one before :: is text."""

MAX_FILE = 8 * 2**20
"""Bytes of a file of lines."""

_SIGNS = re.compile(r"__(?P<name>[^\W_][\w-]*?(?:/[^\W_][\w-]*?)*)__|[{|}]")
_COUNT = re.compile(r"(\d{1,4})\$\$")


@dataclass(frozen=True)
class _Open:
    """What a text leaves open from `begin` to `end`: a file's name, or braces with the places of their | ."""

    begin: int
    end: int
    name: str = ""
    bars: Sequence[int] = ()


def expand(text: str, seed: int, folders: Sequence[Path] = ()) -> str:
    """A prompt with all that it leaves open picked, always the same for the same seed; from the outside in.

    folders: where the files are, the first that has one counts. Braces without a | stay as they are. Raises `LdmError`
    for a file that is missing, outside of its folder, empty or no text, and where the picks have no end.
    """
    chance = random.Random(seed)
    done, rest = "", text
    for _ in range(MAX_PICKS):
        choice = _first_open(rest)
        if choice is None:
            return done + rest
        if choice.name:
            picked = chance.choice(_lines(choice.name, folders))
        else:
            bounds = [choice.begin, *choice.bars, choice.end - 1]
            picked = _pick([rest[begin + 1 : end] for begin, end in pairwise(bounds)], chance)
        done, rest = done + rest[: choice.begin], picked + rest[choice.end :]
        if len(done) + len(rest) > MAX_TEXT:
            break
    raise LdmError(
        f"wildcards: found more than {MAX_PICKS} choices or {MAX_TEXT} characters, expected an end; does a file name "
        f"itself? It has come to {done[:40]!r} ... {rest[:40]!r}"
    )


def _first_open(text: str) -> _Open | None:
    """The choice that begins first; of braces in braces the outer ones."""
    found: list[_Open] = []
    stack: list[tuple[int, list[int]]] = []  # the braces that are open, and the bars right inside of them
    for sign in _SIGNS.finditer(text):
        if sign["name"]:
            found.append(_Open(sign.start(), sign.end(), name=sign["name"]))
        elif sign[0] == "{":
            stack.append((sign.start(), []))
        elif sign[0] == "|" and stack:
            stack[-1][1].append(sign.start())
        elif sign[0] == "}" and stack:
            begin, bars = stack.pop()
            if bars:
                found.append(_Open(begin, sign.end(), bars=bars))
    return min(found, key=lambda choice: choice.begin, default=None)


def _pick(parts: Sequence[str], chance: random.Random) -> str:
    """One of the parts, or as many as the first one asks for, none of them twice."""
    count, first = 1, parts[0]
    if asked := _COUNT.match(first):
        count, first = int(asked[1]), first[asked.end() :]
    options = [_weighted(option) for option in (first, *parts[1:])]
    picked = []
    for _ in range(min(count, len(options))):
        weights = [weight for _, weight in options]
        (index,) = chance.choices(range(len(options)), weights if any(weights) else None)
        picked.append(options.pop(index)[0])
    return ", ".join(picked)


def _weighted(option: str) -> tuple[str, float]:
    number, colons, text = option.partition("::")
    weight = finite_number(number.strip()) if colons else None
    return (option, 1.0) if weight is None or not 0 <= weight <= MAX_WEIGHT else (text, weight)


def _lines(name: str, folders: Sequence[Path]) -> list[str]:
    """The lines of a wildcard's file that count."""
    if not folders:
        raise LdmError(f"wildcards: __{name}__ asks for a line of {name}.txt; name its folder with --wildcards DIR")
    path = next(_paths(name, folders), None)
    if path is None:
        places = ", ".join(str(folder) for folder in folders)
        raise LdmError(f"wildcards: __{name}__: there is no {name}.txt in {places!r}; see --wildcards DIR")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE + 1)
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LdmError(f"wildcards: {str(path)!r}: found no text that can be read ({type(error).__name__})") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or len(text) > MAX_FILE:
        found = f"more than {MAX_FILE} bytes" if lines else "no lines"
        raise LdmError(f"wildcards: {str(path)!r}: found {found}, expected one choice on each line")
    return lines


def _paths(name: str, folders: Sequence[Path]) -> Iterator[Path]:
    """The files of that name in the folders; a link that leads out of its folder is none."""
    for folder in folders:
        try:
            root = folder.resolve()
            path = (root / f"{name}.txt").resolve()
            if path.is_relative_to(root) and path.is_file():
                yield path
        except (OSError, RuntimeError):  # a name too long, links in a circle
            continue

r"""Weights in a prompt, as each of the usual programs has them written, and the chunks that BREAK divides.

Nothing here imports torch, and no text makes it fail: what is no syntax is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from ldm.pipeline.text.prompt import Emphasis, finite_number

MORE, LESS = 1.1, 1 / 1.1
"""What a pair of round and a pair of square brackets multiply a weight by."""

PLUS, MINUS = 1.1, 0.9
"""What each + and - multiplies a weight by in compel's syntax."""

MAX_WEIGHT = 1e4
"""Weights are kept between this and its negative, so that a thousand nested brackets are a number still."""


@dataclass(frozen=True)
class Piece:
    """Some words and their weight. `text` has no white space at its ends and is not empty."""

    text: str
    weight: float = 1.0


Chunk = tuple[Piece, ...]
"""Pieces between one BREAK and the next; neighbours differ in their weights."""


class _Mark(NamedTuple):
    """A token of a syntax: its kind is "text", "break" or the bracket that it is.

    text:   what it reads as; of a bracket, where it has no partner
    weight: of an opening bracket, what it multiplies by if its partner has no number; of a closing one, that number
    """

    kind: str
    text: str
    weight: float | None = None


_CLOSING = {"(": ")", "[": "]"}


_A1111 = re.compile(r"\\(?P<sign>[()\[\]\\]?)|(?P<bracket>[(\[\])])|:\s*(?P<number>[+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_COMFY = re.compile(r"\\(?P<sign>[()])|(?P<bracket>[()])|(?<!\():(?P<number>[^:()\\]*)\)|[^\\():]+|[\\:]")
_COMPEL = re.compile(
    r"""(?P<word>(?: \\[()+\-\\] | [^\s()+\-\\,.="] | \\ | [+-](?![\s()+\-,.="]|\Z) )+) (?P<signs>\++|-+)?
    | (?P<open>\() | \)(?P<scale>\++|-+|\d+\.?\d*|\.\d+)? | [^()]""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


def parse_weights(text: str, syntax: Emphasis = "a1111") -> tuple[Chunk, ...]:
    r"""A prompt -> chunks of weighted pieces, at least one chunk.

    parse_weights("a (red:1.5) [house] BREAK sky")
        == ((Piece("a", 1.0), Piece("red", 1.5), Piece("house", 1 / 1.1)), (Piece("sky", 1.0),))

    Broken brackets are as AUTOMATIC1111 has them: one that is never closed reaches to the end, a closing one too many
    is text. In the other two syntaxes both are text. White space at the ends of a piece has no tokens and is not kept.
    """
    if syntax == "literal":
        return (_tidy([Piece(text)]),)
    if syntax == "comfy":
        return (_tidy(_weighed(list(_comfy_marks(text)), to_end=False, replace=True)),)
    if syntax == "compel":
        return (_tidy(_weighed(list(_compel_marks(text)), to_end=False)),)
    pieces = _weighed(list(_a1111_marks(text)), to_end=True)
    breaks = [i for i, piece in enumerate(pieces) if piece is None]
    chunks = [_tidy(pieces[begin + 1 : end]) for begin, end in zip([-1, *breaks], [*breaks, len(pieces)], strict=True)]
    return tuple(chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1])


def weights_text(chunks: Sequence[Chunk], syntax: Emphasis = "a1111") -> str:
    """A prompt that `parse_weights` takes apart into these chunks."""
    if syntax == "literal":
        return " ".join(piece.text for chunk in chunks for piece in chunk)
    texts = [" ".join(_piece_text(piece, syntax) for piece in chunk) for chunk in chunks]
    return " BREAK ".join([*texts, ""] if len(texts) > 1 and not texts[-1] else texts)


def _piece_text(piece: Piece, syntax: Emphasis) -> str:
    number = format(Decimal(repr(piece.weight)), "f")  # no syntax has exponents
    if syntax == "comfy":
        text = re.sub(r"[()]", r"\\\g<0>", piece.text)
        return text if piece.weight == 1 else f"({text}:{number})"
    if syntax == "compel":
        text = re.sub(r"""[\\()]|[+-](?=[\s()+\-,.="]|\Z)""", r"\\\g<0>", piece.text)
        return text if piece.weight == 1 else f"({text}){number}"
    text = _BREAK.sub(r"BREA\\K", re.sub(r"[\\()\[\]]", r"\\\g<0>", piece.text))
    return text if piece.weight == 1 else f"({text}:{number})"


def _a1111_marks(text: str) -> Iterator[_Mark]:
    """A backslash before none of its signs is dropped, as there."""
    for found in _A1111.finditer(text):
        whole, bracket, number = found[0], found["bracket"], found["number"]
        if found["sign"] is not None:
            yield _Mark("text", found["sign"])
        elif bracket:
            yield _Mark(bracket, whole, {"(": MORE, "[": LESS}.get(bracket))
        elif number:
            yield from _closed_with(whole, finite_number(number))
        else:
            first, *others = _BREAK.split(whole)
            yield _Mark("text", first)
            for other in others:
                yield _Mark("break", "BREAK")
                yield _Mark("text", other)


def _comfy_marks(text: str) -> Iterator[_Mark]:
    for found in _COMFY.finditer(text):
        whole, bracket, number = found[0], found["bracket"], found["number"]
        if found["sign"]:
            yield _Mark("text", found["sign"])
        elif bracket:
            yield _Mark(bracket, whole, MORE if bracket == "(" else None)
        elif number is not None:
            yield from _closed_with(whole, finite_number(number.strip()))
        else:
            yield _Mark("text", whole)


def _closed_with(whole: str, weight: float | None) -> tuple[_Mark, ...]:
    """A bracket that ends ":1.3)"; where that is no number, it is text before a bracket."""
    return (_Mark("text", whole[:-1]), _Mark(")", ")")) if weight is None else (_Mark(")", whole, weight),)


def _compel_marks(text: str) -> Iterator[_Mark]:
    """A sign counts at the end of a word or behind a bracket, not inside of a word ("well-known")."""
    for found in _COMPEL.finditer(text):
        whole, word, scale = found[0], found["word"], found["scale"]
        if word:
            plain = _Mark("text", re.sub(r"\\([()+\-\\])", r"\1", word))
            signs = found["signs"]
            yield from (_Mark("(", "", 1.0), plain, _Mark(")", "", _compel_weight(signs))) if signs else (plain,)
        elif found["open"]:
            yield _Mark("(", whole, 1.0)
        elif whole.startswith(")"):
            yield _Mark(")", whole, _compel_weight(scale) if scale else None)
        else:
            yield _Mark("text", whole)


def _compel_weight(scale: str) -> float | None:
    base = {"+": PLUS, "-": MINUS}.get(scale[0])
    return finite_number(scale) if base is None else base ** len(scale)


def _partners(marks: Sequence[_Mark]) -> dict[int, int]:
    """The index of each opening bracket that is closed -> that of its partner. Round ones do not see square ones."""
    open_brackets: dict[str, list[int]] = {")": [], "]": []}
    partners: dict[int, int] = {}
    for i, mark in enumerate(marks):
        if mark.kind in _CLOSING:
            open_brackets[_CLOSING[mark.kind]].append(i)
        elif open_brackets.get(mark.kind):
            partners[open_brackets[mark.kind].pop()] = i
    return partners


def _weighed(marks: Sequence[_Mark], *, to_end: bool, replace: bool = False) -> list[Piece | None]:
    """Marks -> pieces, None for a BREAK.

    to_end: a bracket that is never closed acts up to the end, else it is text
    replace: an explicit number is the weight, whatever stands outside; else it multiplies
    """
    partners = _partners(marks)
    closing = set(partners.values())
    weights = {")": [1.0], "]": [1.0]}  # of the brackets that are open, the innermost last
    pieces: list[Piece | None] = []
    for i, mark in enumerate(marks):
        if mark.kind in _CLOSING and (to_end or i in partners):
            open_weights = weights[_CLOSING[mark.kind]]
            number = marks[partners[i]].weight if i in partners else None
            factor = (mark.weight or 1.0) if number is None else number
            outer = 1.0 if replace and number is not None else open_weights[-1]
            open_weights.append(_bounded(outer * factor))
        elif i in closing:
            weights[mark.kind].pop()
        else:
            weight = _bounded(weights[")"][-1] * weights["]"][-1])
            pieces.append(None if mark.kind == "break" else Piece(mark.text, weight))
    return pieces


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def _tidy(pieces: Iterable[Piece | None]) -> Chunk:
    """Neighbours of equal weight joined, white space taken off the ends, nothing empty."""
    joined = _joined((piece for piece in pieces if piece is not None), "")
    stripped = (Piece(text, piece.weight) for piece in joined if (text := piece.text.strip()))
    return tuple(_joined(stripped, " "))


def _joined(pieces: Iterable[Piece], between: str) -> Iterator[Piece]:
    texts: list[str] = []
    weight = 1.0
    for piece in pieces:
        if texts and piece.weight != weight:
            yield Piece(between.join(texts), weight)
            texts = []
        texts.append(piece.text)
        weight = piece.weight
    if texts:
        yield Piece(between.join(texts), weight)

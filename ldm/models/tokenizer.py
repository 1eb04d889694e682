"""CLIP's byte-pair tokenizer, offline: the table of merges ships inside the open_clip package.

Sennrich et al. 2016 (byte pairs); Radford et al. 2021, section 2.4. open_clip itself is not imported, since its package
import takes seconds; its ids are the same.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType

import regex

from ldm.errors import LdmError

START, END, COMMA = 49406, 49407, 267
LENGTH = 77
_MARKS = ("<start_of_text>", "<end_of_text>")
_MERGES = 49152 - 256 - 2
_PIECES = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
"""What the text is cut into: the two marks, endings of contractions, words, single digits, runs of anything else."""

NO_WORDS: Mapping[str, Sequence[int]] = MappingProxyType({})
"""No names beside the vocabulary."""


def tokenize(
    text: str, length: int = LENGTH, padding: int = 0, words: Mapping[str, Sequence[int]] = NO_WORDS
) -> list[int]:
    """Text -> exactly `length` ids: start, the words, end, then `padding`. Longer texts are cut before the end.

    padding is 0 for OpenCLIP towers and `END` for CLIP-L (SD 1.x); words: see `word_ids`.
    """
    return framed(word_ids(text, words)[: length - 2], length, padding)


def framed(ids: Sequence[int], length: int = LENGTH, padding: int = 0) -> list[int]:
    """At most `length` - 2 ids between start and end, and padding behind them."""
    return [START, *ids, END] + [padding] * (length - 2 - len(ids))


def word_ids(text: str, words: Mapping[str, Sequence[int]] = NO_WORDS) -> list[int]:
    """Text -> ids without start, end and padding, as many as it takes.

    words: names that stand for ids of their own (textual-inversion embeddings), found as `split_at_names` says.
    """
    return list(chain.from_iterable(word_groups(text, words)))


def word_groups(text: str, words: Mapping[str, Sequence[int]] = NO_WORDS) -> list[Sequence[int]]:
    """`word_ids` in groups that belong together: those of a name are one, every other id is by itself."""
    groups: list[Sequence[int]] = []
    for part, name in split_at_names(text, words):
        groups += ((id_,) for piece in _PIECES.findall(part) for id_ in _piece_ids(piece))
        groups += [words[name]] if name else []
    return groups


def text_of(ids: Iterable[int], words: Mapping[str, Sequence[int]] = NO_WORDS) -> str:
    """What ids read as: the words of `word_ids`, mended and in small letters, a space behind each; names as names."""
    symbols, alphabet = _symbols(), {character: byte for byte, character in _byte_alphabet().items()}
    names = {ids[0]: f"{name} ".encode() for name, ids in words.items()}
    text = bytearray()
    for id_ in ids:
        if id_ < len(symbols):
            symbol = symbols[id_]
            text += bytes(alphabet[character] for character in symbol.removesuffix("</w>"))
            text += b" " if symbol.endswith("</w>") else b""
        text += names.get(id_, b"")
    return text.decode(errors="replace").strip()


def split_at_names(text: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """A text as [(what stands before a name, the name), ...]; the last part's name is empty. The parts are mended.

    A name is found in any letter case, the longest first, and not inside of a longer word or number: "cat" is neither
    in "concatenate" nor in "cat2", but in "cat-toy". AUTOMATIC1111's web UI, which compares tokens, finds the same.
    ComfyUI's "embedding:" before a name goes with it.
    """
    text, known = _clean(text), {_clean(name): name for name in names}
    known.pop("", None)
    if not known:
        return [(text, "")]
    parts, begun = [], 0
    for found in _names_pattern(tuple(known)).finditer(text):
        parts.append((text[begun : found.start()], known[found["name"]]))
        begun = found.end()
    return [*parts, (text[begun:], "")]


def _names_pattern(names: tuple[str, ...]) -> regex.Pattern[str]:
    """Any of the names, where neither a letter nor a digit carries on what the name begins or ends with."""
    longest_first = sorted(names, key=len, reverse=True)
    before, behind = r"(?<![\p{L}\p{N}])", r"(?![\p{L}\p{N}])"
    bounded = (
        f"{before if name[0].isalnum() else ''}{regex.escape(name)}{behind if name[-1].isalnum() else ''}"
        for name in longest_first
    )
    return regex.compile(rf"(?:{before}embedding:)?(?P<name>{'|'.join(bounded)})")


def _clean(text: str) -> str:
    """Mend Unicode and HTML entities, join white space, lower the case, as CLIP's training texts were."""
    if not text.isascii() or not text.isprintable() or "&" in text:
        import ftfy  # here, since most prompts need no mending

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.lru_cache(maxsize=65_536)
def _piece_ids(piece: str) -> tuple[int, ...]:
    """One piece -> ids: its bytes, neighbours merged while the table has such a pair, the earliest pair first."""
    ids, ranks, alphabet = _tables()
    if piece in _MARKS:
        return (ids[piece],)
    symbols = [alphabet[byte] for byte in piece.encode()]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda candidate: ranks.get(candidate, math.inf))
        if pair not in ranks:
            break
        symbols = _merge(symbols, pair)
    return tuple(ids[symbol] for symbol in symbols)


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """The id of every symbol and the merges in their order, as the files of other tokenizers hold them."""
    ids, ranks, _ = _tables()
    marks: dict[str, str] = dict(zip(_MARKS, ("<|startoftext|>", "<|endoftext|>"), strict=True))
    return {marks.get(symbol, symbol): index for symbol, index in ids.items()}, [" ".join(pair) for pair in ranks]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair, from the left."""
    merged: list[str] = []
    rest = iter(range(len(symbols)))
    for i in rest:
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            next(rest)
        else:
            merged.append(symbols[i])
    return merged


@functools.cache
def _tables() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[int, str]]:
    """The id of every symbol, the rank of every pair that merges, the character that stands for every byte."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise LdmError("the tokenizer's table was not found: install open_clip_torch (pip install open_clip_torch)")
    table = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(table.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    pairs = [(first, second) for first, second in map(str.split, lines)]
    alphabet = _byte_alphabet()
    symbols = [
        *alphabet.values(),
        *(c + "</w>" for c in alphabet.values()),
        *(first + second for first, second in pairs),
    ]
    ids = {symbol: index for index, symbol in enumerate([*symbols, *_MARKS])}
    return ids, {pair: rank for rank, pair in enumerate(pairs)}, alphabet


@functools.cache
def _symbols() -> list[str]:
    """The symbol of every id."""
    return list(_tables()[0])


def _byte_alphabet() -> dict[int, str]:
    """A printable character for every byte (GPT-2's table): itself where it is printable; those come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

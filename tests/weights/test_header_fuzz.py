"""Ten thousand broken headers: each ends in our one error or is a sound file, none in a crash, a hang, much memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from ldm.errors import LdmError
from ldm.weights.io import read_header

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.tensor([True, False, True]),
}
SOUND = save(TENSORS, {"format": "pt", "ss_tag_frequency": '{"a": 1}'})
LENGTH = int.from_bytes(SOUND[:8], "little")
HEADER: dict[str, Any] = json.loads(SOUND[8 : 8 + LENGTH])
NUMBERS = SOUND[8 + LENGTH :]

PEAK = 2 * 1024**2
"""Bytes that reading one of these files, all smaller than 20 kB, may take at a time."""

BATCH, EXAMPLES = 20, 250
"""Files made from one draw, and draws: two tests of so many make ten thousand files."""

QUICK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
draws = st.binary(min_size=24 * BATCH, max_size=24 * BATCH)
"""24 bytes for each file say what is changed in it: one large draw is far quicker than many small ones."""


class Choices:
    """A file's share of a draw, used up byte by byte; then everything is the first choice."""

    def __init__(self, stream: bytes) -> None:
        self.bytes = iter(stream)

    def number(self, below: int) -> int:
        """From 0 up to and without `below`, at most 65536."""
        return (next(self.bytes, 0) + 256 * (next(self.bytes, 0) if below > 256 else 0)) % below

    def of(self, things: Sequence[Any]) -> Any:
        return things[self.number(len(things))]


def check(path: Path, content: bytes) -> None:
    """Either our one error in one line, or a sound file of which the library says the same; little memory for both."""
    path.write_bytes(content)
    shapes = None
    tracemalloc.start()
    try:
        shapes = read_header(path).shapes
    except LdmError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < PEAK
    if shapes is not None:
        with safe_open(str(path), framework="pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes  # noqa: SIM118


NAMES = (*TENSORS, "__metadata__", "new", "../x", "x" * 300, "", "\x1b[2J", "\u202e", "\ud800", "\0")
NUMBERS_TRIED = (
    *range(-3, 20), 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63),
    True, False, 1.0, 2.5, 1e308, float("nan"), float("inf"),
)  # fmt: skip
VALUES = (
    *NUMBERS_TRIED, None, "", "1", "F32", "F16", "BF16", "U8", "F8_E4M3", "F4", "F33", "f32", "\ud800", [], {}, [[]],
    [0], [1, 1], [2, 3], [0, 8], [8, 0], [0, 0, 0], [1] * 9, [1] * 1000, [2**62] * 8, [2**63 - 1, 2], ["1", 2],
    {"a": 1}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)  # fmt: skip
FIELDS = ("dtype", "shape", "data_offsets", "more")


def change(header: dict[str, Any], choices: Choices) -> None:
    """Change one thing in a header."""
    name, field, value = choices.of(NAMES), choices.of(FIELDS), choices.of(VALUES)
    entry = header.get(name)
    match choices.number(7):
        case 0:
            header[name] = value
        case 1 if name in header:
            header[choices.of(NAMES)] = header.pop(name)
        case 2:
            header.pop(name, None)
        case 3 if isinstance(entry, dict):
            entry[field] = value
        case 4 if isinstance(entry, dict):
            entry.pop(field, None)
        case 5 if isinstance(entry, dict) and isinstance(entry.get(field), list) and entry[field]:
            entry[field] = [*entry[field]]
            entry[field][choices.number(len(entry[field]))] = choices.of(NUMBERS_TRIED)
        case 6 if name in TENSORS:
            by = choices.number(40) - 20
            header[name] = HEADER[name] | {"data_offsets": [offset + by for offset in HEADER[name]["data_offsets"]]}


@QUICK
@given(draws)
def test_changed_headers(tmp_path: Path, draw: bytes) -> None:
    """Headers that are JSON and hold almost what they should."""
    for start in range(0, len(draw), 24):
        choices = Choices(draw[start : start + 24])
        header = json.loads(json.dumps(HEADER))
        for _ in range(1 + choices.number(3)):
            change(header, choices)
        text = json.dumps(header).encode() + b" " * choices.number(9)
        length = max(0, len(text) + choices.of((0, 0, 0, 0, 0, 1, -1, 8, 2**40)))
        check(tmp_path / "x.safetensors", length.to_bytes(8, "little") + text + NUMBERS)


PIECES = (
    b"", b"\0", b"\xff", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"0", b"9" * 5000, b"[" * 3000,
    b'{"a":' * 2000, b'"\\ud800"', b"NaN", b"1e999", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"PK\x03\x04", b"<html>",
    b" " * 300, SOUND,
)  # fmt: skip


def edit(content: bytearray, choices: Choices) -> None:
    """Change bytes, anywhere in a file."""
    at, count = choices.number(max(1, len(content))), choices.number(60)
    match choices.number(6):
        case 0:
            content[at : at + 1] = bytes([choices.number(256)])
        case 1:
            content[at:at] = choices.of(PIECES)
        case 2:
            del content[at : at + count]
        case 3:
            content[at:at] = content[at : at + count]
        case 4:
            content[at : at + 1] = str(count).encode()
        case 5:
            content[at:] = b"" if count < 20 else content[at:][::-1]


@QUICK
@given(draws)
def test_changed_bytes(tmp_path: Path, draw: bytes) -> None:
    """Files with bytes changed; in half of them the length at the start is mended, so that the text is parsed."""
    for start in range(0, len(draw), 24):
        choices = Choices(draw[start : start + 24])
        content, mend = bytearray(SOUND), choices.number(2)
        for _ in range(1 + choices.number(3)):
            edit(content, choices)
        if mend:
            content[:8] = max(0, len(content) - len(NUMBERS) - 8).to_bytes(8, "little")
        check(tmp_path / "x.safetensors", bytes(content))

"""The hashes that other programs show of a model file, and whether the ones that a file gives of itself are right.

| name                   | over what                                             | digits |
|------------------------|-------------------------------------------------------|--------|
| old short hash (A1111) | 64 KiB from the first MiB on                          | 8      |
| AutoV2, A1111          | the whole file                                        | 10     |
| AutoV3, LoRA hashes    | the numbers: all that follows the header              | 12     |
| `modelspec.hash_sha256`, `sshs_model_hash` | the numbers                       | 64     |
| `sshs_legacy_hash`     | like the old one, of a file with `ss_*` metadata only | 8      |

All are SHA-256. Only the 8-digit ones need no pass over the whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.weights.io import Header

WINDOW_START, WINDOW = 0x100000, 0x10000
CHUNK = 1 << 20

MODELSPEC_HASH = "modelspec.hash_sha256"
KOHYA_HASH = "sshs_model_hash"
KOHYA_SHORT = "sshs_legacy_hash"
OWN_HASHES = (MODELSPEC_HASH, KOHYA_HASH, KOHYA_SHORT)
"""What a file says of its own numbers, and would be wrong of a file that is made from it."""


@dataclass(frozen=True)
class FullHashes:
    """Hashes that take a pass over the whole file. sha256: of all of it; numbers: of what follows the header."""

    sha256: str
    numbers: str

    @property
    def auto_v2(self) -> str:
        """What A1111 and Civitai show for checkpoints."""
        return self.sha256[:10]

    @property
    def auto_v3(self) -> str:
        """What A1111 and Civitai show for LoRAs."""
        return self.numbers[:12]


def old_short_hash(path: str | Path) -> str:
    """The hash that A1111 once showed: 8 digits that many different files share. Reads 64 KiB."""
    return _window(path, WINDOW_START)


def full_hashes(header: Header) -> FullHashes:
    """Read the whole file once, a MiB at a time."""
    whole, numbers = hashlib.sha256(), hashlib.sha256()
    with header.path.open("rb") as file:
        whole.update(file.read(header.data_start))
        while chunk := file.read(CHUNK):
            whole.update(chunk)
            numbers.update(chunk)
    return FullHashes(whole.hexdigest(), numbers.hexdigest())


def check_short(header: Header) -> dict[str, bool]:
    """Whether the file's `sshs_legacy_hash` is right, where it has one that can be computed. Reads 64 KiB."""
    said = header.metadata.get(KOHYA_SHORT)
    start = None if said is None else _kohya_window(header)
    return {} if start is None else {KOHYA_SHORT: said == _window(header.path, start)}


def check_full(header: Header, full: FullHashes) -> dict[str, bool]:
    """Which of the long hashes that a file gives of its numbers are right.

    OneTrainer hashes the tensors sorted by name, whatever their order in the file: that counts as right too.
    """
    said = {key: header.metadata[key] for key in (MODELSPEC_HASH, KOHYA_HASH) if key in header.metadata}
    found = {key: value.lower().removeprefix("0x") for key, value in said.items()}
    checked = {key: value == full.numbers for key, value in found.items()}
    if not all(checked.values()):
        by_name = _hash_by_name(header)
        checked = {key: right or found[key] == by_name for key, right in checked.items()}
    return checked


def _window(path: str | Path, start: int) -> str:
    with Path(path).open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(WINDOW)).hexdigest()[:8]


def _kohya_window(header: Header) -> int | None:
    """Where in this file the window of a file with nothing but `ss_*` metadata lies; None: partly in its header."""
    told = {key: value for key, value in header.metadata.items() if key.startswith("ss_")}
    bare = _header_length(header, told)
    return None if bare > WINDOW_START else header.data_start + WINDOW_START - bare


def _header_length(header: Header, metadata: Mapping[str, str]) -> int:
    """Bytes before the numbers as the safetensors library would write them: JSON without blanks, filled up to 8."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for name, tensor in header.tensors.items():
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (tensor.begin, tensor.end)}
    length = len(json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    return 8 + length + -length % 8


def _hash_by_name(header: Header) -> str:
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        for _, tensor in sorted(header.tensors.items()):
            file.seek(header.data_start + tensor.begin)
            left = tensor.end - tensor.begin
            while left and (chunk := file.read(min(left, CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()

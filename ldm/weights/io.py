"""Reading .safetensors files: the header is checked by ourselves, then tensors are mapped one by one.

The format is 8 bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), then all numbers. The
library that maps the tensors accepts duplicate keys and says "header too large" of a web page saved under the wrong
name, so everything that can be wrong is found here first, and named.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import LdmError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""The dtypes that are read, and the size of one number in bytes."""

MAX_HEADER = 100_000_000
MAX_TENSORS = 20_000
MAX_METADATA = 8 * 1024**2
MAX_RANK = 8
MAX_NAME = 256

PICKLE = "pickles can run code and are not read: convert it to .safetensors first"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
AGAIN = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header. begin, end: byte offsets, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    modified: int

    @staticmethod
    def of(status: os.stat_result) -> Stamp:
        """What the system says of a file."""
        return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """A checked header. data_start: where in the file the numbers begin."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    stamp: Stamp

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def printable(text: str) -> str:
    """The text on one line, with everything that a terminal would obey instead of show written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def read_header(path: str | Path) -> Header:
    """Read and check a file's header: names, dtypes, shapes, offsets without gap or overlap, the file's size.

    Nothing else of the file is read. Raises LdmError that says what the file is instead, or where it is broken.
    """
    path = Path(path)
    with _open(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        try:
            raw = _header_bytes(file, stamp.size, path.suffix.lower())
            tensors, metadata = _parse(raw)
            data_start = 8 + len(raw)
            _check_layout(tensors, data_start, stamp.size)
        except (ValueError, RecursionError) as error:
            raise LdmError(f"{printable(str(path))}: {printable(str(error))}") from None
    return Header(path, tensors, metadata, data_start, stamp)


def read_tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, in the order of the file, each mapped: its bytes are read when they are first used.

    The mapping is private: writing to such a tensor changes neither the file nor other mappings of it. Raises LdmError
    when the file is no longer the one whose header was read.
    """
    shown = printable(str(header.path))
    try:
        with safe_open(str(header.path), framework="pt", device="cpu") as file:
            _check_unchanged(header)
            for name in sorted(names, key=lambda name: header.tensors[name].begin):
                yield name, file.get_tensor(name)
        _check_unchanged(header)
    except (SafetensorError, OSError) as error:
        raise LdmError(f"{shown}: cannot be mapped: {printable(str(error))}") from error


def _check_unchanged(header: Header) -> None:
    if Stamp.of(header.path.stat()) != header.stamp:
        raise LdmError(f"{printable(str(header.path))}: was changed while it was being read; try again")


def _open(path: Path) -> BinaryIO:
    """Open a regular file. A pipe is opened without waiting for its writer, and then refused like every device."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", opener=opener)  # noqa: SIM115 (the caller closes it)
    except (OSError, ValueError) as error:
        raise LdmError(f"{printable(str(path))}: {_why_not_opened(path, error)}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LdmError(f"{printable(str(path))}: is a pipe or a device; expected a .safetensors file")
    return file


def _why_not_opened(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return f"is a link to {printable(str(path.readlink()))}, which does not exist"
        return "no such file; give the path of a .safetensors file"
    if isinstance(error, IsADirectoryError):
        return "is a folder; expected a .safetensors file"
    if isinstance(error, PermissionError):
        return "no permission to read it; change its access rights (chmod u+r)"
    return f"cannot be opened: {printable(getattr(error, 'strerror', None) or str(error))}"


def _header_bytes(file: BinaryIO, size: int, suffix: str) -> bytes:
    """The header as it stands on disk, once its length makes sense. Raises ValueError."""
    head = file.read(512)
    if not head:
        raise ValueError("empty file; " + AGAIN)
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and length <= MAX_HEADER and head[8:9] == b"{":
        if 8 + length > size:
            raise ValueError(f"incomplete: have {size} bytes, its header alone needs {8 + length}; {AGAIN}")
        file.seek(8)
        return file.read(length)
    _say_what_it_is(head, suffix)
    if size < 10:
        raise ValueError(f"incomplete: have {size} bytes, the smallest .safetensors file has 10; {AGAIN}")
    if length > MAX_HEADER:
        raise ValueError(
            f"not a .safetensors file: its header would have {length} bytes, at most {MAX_HEADER} are allowed"
        )
    raise ValueError("not a .safetensors file: its header is no JSON object ('{' expected at byte 8)")


MAGIC = (
    (b"PK\x03\x04", f"is a zip archive, most likely a PyTorch checkpoint (pickle); {PICKLE}"),
    (b"GGUF", "is a GGUF file; expected .safetensors"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself; run: git lfs pull"),
    (b"\x89HDF", "is an HDF5 (Keras) file; expected .safetensors"),
    (b"\x93NUMPY", "is a NumPy array; expected .safetensors"),
    (b"\x89PNG", "is a PNG picture; expected a .safetensors model"),
    (b"\xff\xd8\xff", "is a JPEG picture; expected a .safetensors model"),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
)
"""What stands at the start of files that are not .safetensors, and what to say of them."""


def _say_what_it_is(head: bytes, suffix: str) -> None:
    """Raise ValueError where the first bytes tell what else the file is."""
    for magic, message in MAGIC:
        if head.startswith(magic):
            raise ValueError(message)
    if re.match(rb"\x80[\x01-\x05][^\0]", head) or head[257:262] == b"ustar" or suffix in PICKLE_SUFFIXES:
        raise ValueError(f"is a PyTorch checkpoint (pickle); {PICKLE}")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        raise ValueError(f"looks like HTML, not a model: a web page was saved instead of the file; {AGAIN}")
    if not head.strip(b"\0"):
        raise ValueError(f"starts with zeros only: its download was never finished; {AGAIN}")
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        raise ValueError(f"is plain text ({head[:40].decode('ascii')!r}), not a .safetensors model; {AGAIN}")


def _parse(raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header's JSON -> tensors and metadata. Raises ValueError."""
    _check_count(raw.count(b'"data_offsets"'))  # before parsing, which is slow where there are very many
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA:
        raise ValueError(f"metadata is longer than {MAX_METADATA} characters; remove it")
    _check_count(len(header))
    return {name: _entry(name, entry) for name, entry in header.items()}, metadata


def _check_count(count: int) -> None:
    if count > MAX_TENSORS:
        raise ValueError(f"too many tensors: {count}, at most {MAX_TENSORS} are read")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"broken header: {name[:MAX_NAME]!r} stands there twice")
        unique[name] = value
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"broken header: {name} is not JSON")


def _entry(name: str, entry: Any) -> TensorInfo:
    """One entry, checked by itself. Raises ValueError."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError(f"broken header: {name[:MAX_NAME]!r} is not a tensor name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"broken header: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has dtype {str(dtype)[:20]}; known are {', '.join(ITEM_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"broken header: {name} needs a shape of at most {MAX_RANK} sizes, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"broken header: {name} needs two data_offsets, none negative")
    needed, given = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise ValueError(
            f"broken header: {name}, {dtype} {tuple(shape)}, takes {needed} bytes, its offsets give {given}"
        )
    return TensorInfo(dtype, tuple(shape), *offsets)


def _whole_numbers(value: Any) -> bool:
    """Whether this is a list of JSON integers from 0 to 2^63 - 1 (`true` is none)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """The tensors must follow each other without gap or overlap and end where the file ends. Raises ValueError."""
    position, previous = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else "leaves a gap after"
            raise ValueError(f"broken header: {name} {what} {previous} ({tensor.begin} instead of {position})")
        position, previous = tensor.end, name
    if size < data_start + position:
        raise ValueError(f"incomplete: have {size} of {data_start + position} bytes; {AGAIN}")
    if size > data_start + position:
        extra = size - data_start - position
        raise ValueError(f"{extra} bytes follow the last tensor: {size} instead of {data_start + position}; {AGAIN}")

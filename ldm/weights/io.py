"""Reading .safetensors files: the header is checked, then tensors are mapped.

The format is 8 bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), then all numbers. The
format's own library accepts duplicate keys, says "header too large" of a web page saved under the wrong name, and maps
the file as a whole until its last tensor is gone; so everything that can be wrong is found and named here, and the
mapping is made here too.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from ldm.errors import LdmError, printable

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""The dtypes that are read, and the size of one number in bytes."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
}  # fmt: skip
"""How the format names torch's dtypes."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

WINDOW = 64 * 1024**2
"""How many bytes are mapped together."""

MADV_POPULATE_READ = 22
"""Linux's; Python's `mmap` has no name for it."""

MAX_HEADER = 100_000_000
MAX_TENSORS = 20_000
MAX_METADATA = 8 * 1024**2
MAX_RANK = 8
MAX_NAME = 256

PICKLE = "pickles can run code and are read only where --allow-pickle says so; ldm convert makes a .safetensors of it"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
AGAIN = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read. dtype: in the format's words, as F16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """One entry of a header. begin, end: byte offsets, counted from the header's end."""

    begin: int
    end: int


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
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int
    stamp: Stamp

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def needed(self) -> int:
        """How many bytes the file has when it is whole."""
        return self.data_start + max((tensor.end for tensor in self.tensors.values()), default=0)


def some(names: Sequence[str], shown: int = 10) -> str:
    """The first names, printable and on one line, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(map(printable, names[:shown])) + (f" and {rest} more" if rest > 0 else "")


def read_header(path: str | Path, *, whole: bool = True) -> Header:
    """Read and check a file's header: names, dtypes, shapes, offsets without gap or overlap, the file's size.

    Nothing else of the file is read. whole: False takes a file whose end is missing, too; its tensors may not be there.
    Raises LdmError that says what the file is instead, or where it is broken.
    """
    path = Path(path)
    with open_regular(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        try:
            raw = _header_bytes(file, stamp.size, path.suffix.lower())
            tensors, metadata = _parse(raw)
            data_start = 8 + len(raw)
            _check_layout(tensors)
            header = Header(path, tensors, metadata, data_start, stamp)
            if whole or stamp.size > header.needed:
                _check_size(stamp.size, header.needed)
        except (ValueError, RecursionError) as error:
            raise LdmError(f"{printable(str(path))}: {printable(str(error))}") from None
    return header


def read_tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, in the order of the file, each mapped: nothing is copied.

    The mapping is private: writing to such a tensor changes neither the file nor other mappings of it. It is made
    window by window, and a window is given back as soon as its last tensor is gone, so whoever casts tensors one by one
    holds one copy. Raises LdmError when the file is no longer the one whose header was read.
    """
    try:
        with open_regular(header.path) as file:
            _check_unchanged(header)
            for window in _windows(header, names):
                yield from _mapped(file, header, window)
        _check_unchanged(header)
    except OSError as error:
        raise LdmError(f"{printable(str(header.path))}: cannot be mapped: {printable(str(error))}") from error


def in_groups(names: Iterable[str], tensors: Mapping[str, TensorInfo], most: int) -> Iterator[list[str]]:
    """The names in this order, in groups of at most `most` bytes, or of one tensor."""
    group: list[str] = []
    size = 0
    for name in names:
        more = tensors[name].count * ITEM_BYTES[tensors[name].dtype]
        if group and size + more > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    if group:
        yield group


def _windows(header: Header, names: Iterable[str]) -> Iterator[list[str]]:
    """The names in the order of the file, in groups that span at most WINDOW bytes, or that one tensor makes."""
    window: list[str] = []
    for name in sorted(names, key=lambda name: header.tensors[name].begin):
        if window and header.tensors[name].end - header.tensors[window[0]].begin > WINDOW:
            yield window
            window = []
        window.append(name)
    if window:
        yield window


def _mapped(file: BinaryIO, header: Header, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one window. They keep it mapped, and nothing else does."""
    infos = [header.tensors[name] for name in names]
    begin, end = header.data_start + infos[0].begin, header.data_start + max(info.end for info in infos)
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    memory = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start) if end > begin else None
    if memory is not None:
        _populate(memory)
    for name, info in zip(names, infos, strict=True):
        dtype = TORCH_DTYPES[info.dtype]
        if memory is None or info.count == 0:
            yield name, torch.empty(info.shape, dtype=dtype)
        else:
            offset = header.data_start + info.begin - start
            yield name, torch.frombuffer(memory, dtype=dtype, count=info.count, offset=offset).view(info.shape)


def _populate(memory: mmap.mmap) -> None:
    """Have the pages mapped in one go, where the system can: one by one, on first use, takes several times as long."""
    if sys.platform != "linux":
        return
    try:
        memory.madvise(MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which kernels before 5.14 say
            raise


def _check_unchanged(header: Header) -> None:
    if Stamp.of(header.path.stat()) != header.stamp:
        raise LdmError(f"{printable(str(header.path))}: was changed while it was being read; try again")


def open_regular(path: Path) -> BinaryIO:
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


ZIP = b"PK\x03\x04"
MAGIC = (
    (ZIP, f"is a zip archive, most likely a PyTorch checkpoint (pickle); {PICKLE}"),
    (b"GGUF", "is a GGUF file; expected .safetensors"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself; run: git lfs pull"),
    (b"\x89HDF", "is an HDF5 (Keras) file; expected .safetensors"),
    (b"\x93NUMPY", "is a NumPy array; expected .safetensors"),
    (b"\x89PNG", "is a PNG picture; expected a .safetensors model"),
    (b"\xff\xd8\xff", "is a JPEG picture; expected a .safetensors model"),
    (b"\x1f\x8b", "is gzip-compressed; unpack it first"),
)
"""What stands at the start of files that are not .safetensors, and what to say of them."""


def is_pickle(path: Path) -> bool:
    """Whether a file is what `torch.save` wrote, by its first bytes or, where they say nothing, by its name."""
    with open_regular(path) as file:
        head = file.read(512)
    return head[8:9] != b"{" and (head.startswith(ZIP) or _is_raw_pickle(head, path.suffix.lower()))


def _is_raw_pickle(head: bytes, suffix: str) -> bool:
    """Whether this is a pickle without a zip archive around it; those that torch wrote before 1.6 are."""
    known = any(head.startswith(magic) for magic, _ in MAGIC)
    return (
        bool(re.match(rb"\x80[\x01-\x05][^\0]", head))
        or head[257:262] == b"ustar"
        or (suffix in PICKLE_SUFFIXES and not known)
    )


def _say_what_it_is(head: bytes, suffix: str) -> None:
    """Raise ValueError where the first bytes tell what else the file is."""
    for magic, message in MAGIC:
        if head.startswith(magic):
            raise ValueError(message)
    if _is_raw_pickle(head, suffix):
        raise ValueError(f"is a PyTorch checkpoint (pickle); {PICKLE}")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        raise ValueError(f"looks like HTML, not a model: a web page was saved instead of the file; {AGAIN}")
    if not head.strip(b"\0"):
        raise ValueError(f"starts with zeros only: its download was never finished; {AGAIN}")
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        raise ValueError(f"is plain text ({head[:40].decode('ascii')!r}), not a .safetensors model; {AGAIN}")


def _parse(raw: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
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


def check_name(name: str) -> None:
    """A tensor's name must be short, printable and no path. Raises ValueError."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError(f"broken header: {name[:MAX_NAME]!r} is not a tensor name")


def _entry(name: str, entry: Any) -> StoredTensor:
    """One entry, checked by itself. Raises ValueError."""
    check_name(name)
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
    return StoredTensor(dtype, tuple(shape), *offsets)


def _whole_numbers(value: Any) -> bool:
    """Whether this is a list of JSON integers from 0 to 2^63 - 1 (`true` is none)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: Mapping[str, StoredTensor]) -> None:
    """The tensors must follow each other without gap or overlap. Raises ValueError."""
    position, previous = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else "leaves a gap after"
            raise ValueError(f"broken header: {name} {what} {previous} ({tensor.begin} instead of {position})")
        position, previous = tensor.end, name


def _check_size(size: int, needed: int) -> None:
    """The file must end where its last tensor ends. Raises ValueError."""
    if size < needed:
        raise ValueError(f"incomplete: have {size} of {needed} bytes; {AGAIN}")
    if size > needed:
        raise ValueError(f"{size - needed} bytes follow the last tensor: {size} instead of {needed}; {AGAIN}")

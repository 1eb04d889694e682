"""What torch.save wrote (.ckpt, .pt, .pth, .bin), read without running what a pickle may ask for.

torch's restricted unpickler does the reading. It builds nothing but tensors and plain containers, yet it inflates
compressed members and lets a pickle ask for more memory than there is; so the zip archive and the names in its pickle
are looked at first. What does not pass is refused: there is no way round this to the full unpickler.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import AGAIN, DTYPES, MAX_TENSORS, ZIP, Stamp, check_name, open_regular, printable

MAX_PICKLE = 64 * 1024**2
MAX_DIRECTORY = 200 * (MAX_TENSORS + 100)
"""Of the pickle itself, which holds names and shapes but no numbers, and of the archive's directory, in bytes."""

ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
    *(("torch", f"{kind}Storage") for kind in (
        "Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool",
    )),
}  # fmt: skip
"""All that a pickle of weights needs to name."""

BROKEN = (
    ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError, RuntimeError, OSError,
    AssertionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What torch and Python raise of a damaged pickle."""

REMEDY = "export it as .safetensors with the program that wrote it, where you trust the file"


@dataclass(frozen=True, eq=False)
class Pickled:
    """The tensors of a pickle, mapped; and the text and whole numbers beside them."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_pickle(path: Path) -> Pickled:
    """Read what torch.save wrote in its zip format (torch 1.6 or later).

    Of a training checkpoint the tensors under `state_dict` are taken; elsewhere a dict in the dict gives names joined
    by dots. Raises LdmError where the archive is not as torch writes it, or its pickle asks for anything but tensors.
    """
    try:
        with open_regular(path) as file:
            _check_archive(file)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if Stamp.of(os.fstat(file.fileno())) != Stamp.of(path.stat()):
                raise ValueError("was changed while it was being read; try again")
        return _tensors_of(loaded)
    except BROKEN as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LdmError(f"{printable(str(path))}: {printable(message)[:300]}") from None


def _check_archive(file: BinaryIO) -> None:
    """Whether the file is an archive as torch writes it, whose pickle names nothing but tensors. Raises ValueError."""
    if file.read(4) != ZIP:
        raise ValueError(f"is a pickle without a zip archive, as torch wrote before 1.6: not read; {REMEDY}")
    size = file.seek(0, 2)
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise ValueError("its zip archive has two members of one name; " + REMEDY)
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or any(member.filename.endswith("/constants.pkl") for member in members):
            raise ValueError(f"is a zip archive, but not of torch.save's weights; {REMEDY}")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("its zip archive is compressed, which torch never does; " + REMEDY)
        if sum(member.file_size for member in members) > size:
            raise ValueError("its zip archive claims to hold more than the file; " + AGAIN)
        if pickles[0].file_size > MAX_PICKLE:
            raise ValueError(f"its pickle has {pickles[0].file_size} bytes, at most {MAX_PICKLE} are read")
        _check_names(archive.read(pickles[0]))


def _check_directory(file: BinaryIO, size: int) -> None:
    """The archive's last record must stand at the very end and give a directory of sane size.

    So no reader of zip archives can find another directory than the next one does. Raises ValueError.
    """
    broken = f"its zip archive has no proper end: incomplete, or not written by torch; {AGAIN}"
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    record64, locator64, end = tail[:56], tail[56:76], tail[76:]
    if not end.startswith(b"PK\5\6") or end[20:] != b"\0\0":
        raise ValueError(broken)
    directory = int.from_bytes(end[12:16], "little")
    if locator64.startswith(b"PK\6\7"):
        offset = int.from_bytes(locator64[8:16], "little")
        if offset != size - 98 or not record64.startswith(b"PK\6\6"):
            raise ValueError(broken)
        directory = int.from_bytes(record64[40:48], "little")
    if directory > MAX_DIRECTORY:
        raise ValueError(f"its zip archive has a directory of {directory} bytes, at most {MAX_DIRECTORY} are read")


def _check_names(data: bytes) -> None:
    """Every name that the pickle would import must be allowed. Raises ValueError."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle is not of the kind that torch.save writes ({opcode.name}); {REMEDY}")
        if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in ALLOWED:
            name = str(argument).replace(" ", ".")[:100]
            raise ValueError(f"its pickle asks for {name}, which is no tensor: not read, it may run code; {REMEDY}")


def _tensors_of(loaded: Any) -> Pickled:
    """The tensors that were in the pickle, and words about them. Raises ValueError."""
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}; expected a dict of tensors, as from model.state_dict()")
    state = loaded.get("state_dict")
    entries = _flat(state if isinstance(state, dict) else loaded)
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"too many tensors: {len(tensors)}, at most {MAX_TENSORS} are read")
    for name, tensor in tensors.items():
        check_name(name)
        if tensor.dtype not in DTYPES or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name}, {tensor.dtype} {tuple(tensor.shape)}, is not a tensor with all its numbers")
    words = {
        str(key): str(value)
        for key, value in loaded.items()
        if isinstance(value, str | int) and not isinstance(value, bool) and len(str(value)) <= 1000
    }
    return Pickled(tensors, words)


def _flat(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """Entries by name; those of a dict in the dict under both names, joined by a dot."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": item for key, item in inner} or {str(name): value}
    return flat

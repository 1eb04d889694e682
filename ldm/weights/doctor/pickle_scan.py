"""What a PyTorch pickle names, told by reading its instructions and never by running them.

A pickle is a program: loading one calls the functions that it names. `torch.save` needs a dozen harmless ones; any
other name is either a class of the trainer's, which a restricted reader refuses, or an attack.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from ldm.errors import LdmError
from ldm.weights.io import AGAIN, printable

MAX_PICKLE = 16 * 1024**2
MAX_STEPS = 1_000_000
"""Bytes and instructions of a pickle that are looked at; those of real checkpoints have a tenth of them."""

LEGACY = 0x1950A86A20F9469CFC6C
LEGACY_PICKLES = 5
"""A file from before PyTorch 1.6 starts with a pickle of this number and is so many pickles in a row, then numbers."""

HARMLESS = re.compile(
    r"collections\.(OrderedDict|defaultdict)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state|device_tensor_from_numpy)"
    r"|torch\.(storage\.)?(_|Untyped|Typed)?(\w*Storage)"
    r"|torch\.(u?int\d+|float\d+\w*|bfloat16|half|double|long|bool|Tensor|Size|device|dtype)"
    r"|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout|torch\._tensor\._rebuild_from_type_v2"
    r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|complex|bool|str|bytes|bytearray|slice|range)"
)
"""Names that hold tensors and plain values together."""

DANGEROUS = re.compile(
    r"(os|posix|nt|posixpath|ntpath|subprocess|commands|sys|shutil|socket|pty|platform|signal|ctypes|_ctypes|cffi"
    r"|builtins|__builtin__|importlib|runpy|code|codeop|marshal|types|inspect|imp|pkgutil|zipimport"
    r"|pickle|_pickle|cPickle|dill|cloudpickle|joblib|copyreg|operator|_operator|functools|asyncio"
    r"|multiprocessing|threading|concurrent|webbrowser|http|httplib|urllib|urllib2|requests|aiohttp|ftplib|smtplib"
    r"|telnetlib|xmlrpc|tempfile|io|_io|fileinput|linecache|logging|pdb|bdb|timeit|cProfile|profile|trace"
    r"|doctest|pydoc|venv|ensurepip|pip|setuptools|distutils|sqlite3|winreg|msvcrt|atexit"
    r"|torch\.(hub|load|jit|package|serialization|utils|_inductor|_dynamo|fx|distributed|multiprocessing|ops|classes)"
    r"|numpy\.(testing|f2py|distutils|lib|load|loadtxt|ctypeslib))(\.|$).*"
)
"""Names that can do anything to the machine, or lead to one that can."""

STRINGS = {
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
UNKNOWN = "a name that is computed while it loads"


@dataclass(frozen=True)
class PickleScan:
    """What a pickle file names.

    names: all that it would import; dangerous: functions that can harm the machine; foreign: classes of other packages,
    which a restricted reader refuses; keys: all text in it, so the tensors' names too; complete: whether all of it was
    understood.
    """

    names: tuple[str, ...]
    dangerous: tuple[str, ...]
    foreign: tuple[str, ...]
    keys: tuple[str, ...]
    complete: bool

    @property
    def verdict(self) -> str:
        """The risk in one sentence."""
        if self.dangerous:
            return f"DANGEROUS: loading it runs {', '.join(self.dangerous[:5])}; delete it"
        if not self.complete:
            return "suspicious: it cannot be read to its end"
        if self.foreign:
            return f"it needs classes of other packages ({', '.join(self.foreign[:5])}), which are never run"
        return "none found: it names nothing but what tensors need"


@dataclass
class _Found:
    """What has been seen so far.

    pushed: what the last two instructions left on the pickle's stack, None for all but text; memo: what it keeps.
    legacy: whether the mark of an old PyTorch file was there.
    """

    names: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    legacy: bool = False
    pushed: deque[str | None] = field(default_factory=lambda: deque([None, None], maxlen=2))
    memo: dict[int, str | None] = field(default_factory=dict)


def scan_pickle(path: str | Path) -> PickleScan:
    """List what a .ckpt, .pt or .bin file names. Nothing of it is run, and at most 16 MiB of each pickle are read.

    Raises LdmError where the file is no pickle at all.
    """
    path = Path(path)
    found, complete = _Found(), True
    try:
        for raw in _pickles(path):
            complete &= _read(BytesIO(raw), found) and len(raw) <= MAX_PICKLE
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise LdmError(f"{printable(str(path))}: its archive is broken: {printable(str(error))}; {AGAIN}") from None
    if not found.names and not found.keys and not complete:
        raise LdmError(f"{printable(str(path))}: is no PyTorch checkpoint (no pickle in it); {AGAIN}")
    others = [name for name in found.names if not HARMLESS.fullmatch(name)]
    dangerous = tuple(name for name in others if name == UNKNOWN or DANGEROUS.fullmatch(name))
    foreign = tuple(name for name in others if name not in dangerous)
    return PickleScan(tuple(found.names), dangerous, foreign, tuple(found.keys), complete)


def _pickles(path: Path) -> Iterator[bytes]:
    """The bytes of each pickle, or of the file's start where pickles follow each other."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield file.read(MAX_PICKLE)
            return
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".pkl")]
        for name in members[:LEGACY_PICKLES]:
            with archive.open(name) as member:
                yield member.read(MAX_PICKLE + 1)
        if not members:
            raise ValueError("there is no .pkl in it")
        if len(members) > LEGACY_PICKLES:
            raise ValueError(f"{len(members)} pickles in one file; expected 1")


def _read(file: IO[bytes], found: _Found) -> bool:
    """Go through one pickle, or the five of an old PyTorch file. Returns whether each could be read to its end."""
    steps = 0
    for _ in range(LEGACY_PICKLES):
        found.memo.clear()
        try:
            for code, argument, _ in pickletools.genops(file):
                _step(code.name, argument, found)
                steps += 1
                if steps > MAX_STEPS:
                    return False
        except (ValueError, IndexError, OverflowError, TypeError):
            return False
        if not found.legacy:
            break
    return True


def _step(code: str, argument: Any, found: _Found) -> None:
    """One instruction: keep the names that it imports, and as much of the stack as names are taken from."""
    if code in STRINGS:
        text = argument if isinstance(argument, str) else argument.decode("latin-1")
        found.pushed.append(text)
        found.keys[text] = None
    elif code in ("GLOBAL", "INST"):
        found.names[argument.replace(" ", ".", 1)] = None
        found.pushed.append(None)
    elif code == "STACK_GLOBAL":
        module, name = found.pushed
        found.names[UNKNOWN if module is None or name is None else f"{module}.{name}"] = None
        found.pushed.append(None)
    elif code in ("EXT1", "EXT2", "EXT4"):
        found.names[UNKNOWN] = None
        found.pushed.append(None)
    elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
        found.memo[int(argument)] = found.pushed[-1]
    elif code == "MEMOIZE":
        found.memo[len(found.memo)] = found.pushed[-1]
    elif code in ("GET", "BINGET", "LONG_BINGET"):
        found.pushed.append(found.memo.get(int(argument)))
    elif code not in ("PROTO", "FRAME"):
        found.legacy |= argument == LEGACY
        found.pushed.append(None)  # whatever it leaves there is taken for no text

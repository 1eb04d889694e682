"""Files in and out: bounded reads, names that never collide, writes that are whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ldm.errors import LdmError

MAX_STEM_BYTES = 80

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What pictures are written as, by the ending of their name."""

OTHER_SUFFIXES = (".gif", ".avif", ".jxl", ".bmp", ".tif", ".tiff")
"""Endings that mean a picture and no folder, of a kind that is not written."""


def read_file(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes.

    Raises `LdmError` for anything else; never waits on a pipe.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise LdmError(f"{path}: found {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, expected a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LdmError(f"{path}: cannot be read ({reason(error)}); check the path") from None
    if len(data) > limit:
        raise LdmError(f"{path}: found more than {limit / 2**20:.0f} MiB, expected a smaller file")
    return data


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a plain file, in hexadecimal; None of anything else, or of what cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def stem_of(prompt: str) -> str:
    """A file name's stem from a prompt: words joined by hyphens, at most 80 bytes, safe on every system."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())
    stem = "-".join(words).encode("utf-8", "ignore")[:MAX_STEM_BYTES].decode("utf-8", "ignore")
    return stem.strip("-_") or "picture"


def check_output(output: Path) -> None:
    """Raise `LdmError` early where `output`, a picture's file or a folder, can never be written."""
    try:
        _check_output(output)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise LdmError(f"{output}: cannot be written ({reason(error)}); choose another output") from None


def _check_output(output: Path) -> None:
    if str(output) == "-":
        raise LdmError(
            "output: found -, expected a .png, .jpg or .webp file or a folder; pictures are not written to the terminal"
        )
    if names_file(output) and output.is_dir():
        raise LdmError(f"{output}: is a folder, expected a picture file's name; choose another")
    if not names_file(output) and (
        output.is_file() or output.suffix.lower() in (".gif", ".avif", ".jxl", ".bmp", ".tif", ".tiff")
    ):
        raise LdmError(f"{output}: expected a name that ends in .png, .jpg or .webp, or a folder")
    existing = output.parent if names_file(output) else output
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise LdmError(f"{existing}: is not a folder, expected one to write pictures to; choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LdmError(f"{existing}: is not writable; choose another output")


def names_file(output: Path) -> bool:
    """Whether an output path means one file, and not a folder."""
    return output.suffix.lower() in PICTURE_SUFFIXES


def output_path(output: Path, prompt: str, seed: int) -> Path:
    """Where a picture goes: `output` itself if it names a file, else a name from prompt and seed in that folder."""
    return output if names_file(output) else output / f"{stem_of(prompt)}-{seed}.png"


def write_new(path: Path, data: bytes) -> Path:
    """Write `data` under the first free of the names path, path-2, path-3 ...; whole, on the disk, by the umask."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent, data) as temporary:
            for candidate in _numbered(path):
                with contextlib.suppress(FileExistsError):
                    _publish(temporary, candidate)
                    return candidate
    except (OSError, ValueError) as error:
        raise LdmError(f"{path}: cannot be written ({reason(error)}); choose another output or make room") from None
    raise AssertionError("names never run out")


@contextlib.contextmanager
def _temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A file beside the target that holds `data` for certain, gone afterwards."""
    temporary = folder / f".ldm-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished file its name. Raises FileExistsError where that is taken."""
    try:
        os.link(temporary, target)  # unlike a rename, it never replaces a file
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        if target.exists():
            raise FileExistsError(target) from None
        temporary.replace(target)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def reason(error: Exception) -> str:
    """Why the system refused, in a few words."""
    return (getattr(error, "strerror", None) or str(error)).lower()

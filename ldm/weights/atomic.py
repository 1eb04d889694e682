"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.errors import LdmError
from ldm.weights.io import printable


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the block ends, on disk and not only in memory.

    It lies in the same folder until then; if anything goes wrong it is removed, and what was at `path` stays. Its
    access rights follow the umask. Raises LdmError where the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends, whole and on disk.

    It lies beside `path` until then; if anything goes wrong it is removed with all that is in it. Raises LdmError where
    there is something at `path` already, which is never replaced, and where the folder around it cannot be written to.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        _check_free(path)
        temporary.mkdir()
        yield temporary
        for folder, _, _ in os.walk(temporary):
            _sync_folder(Path(folder))
        _check_free(path)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _not_written(path: Path, error: OSError) -> LdmError:
    return LdmError(f"{printable(str(path))}: cannot be written: {error.strerror or error}; nothing was changed")


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, "it exists already, and a folder is never replaced")


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

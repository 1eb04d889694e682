"""One writer at a time: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ldm.errors import LdmError
from ldm.pipeline.files import reason
from ldm.weights.io import printable

NAME = "lock"


@contextmanager
def locked(index: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the index folder, alone or together with others that share it.

    The file stays behind and means nothing: what counts is the system's lock on it, so a killed run leaves none that is
    stale. Raises `LdmError` where another process holds it, which is named.
    """
    path = index / NAME
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LdmError(
            f"{printable(str(path))}: cannot be written ({reason(error)}); choose another place with --index"
        ) from None
    with file:
        try:
            _lock(file, shared)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = printable(file.read(200).strip()) or "another process"
            raise LdmError(f"{printable(str(index))}: is being written by {holder}; wait until it ends") from None
        except OSError as error:
            raise LdmError(
                f"{printable(str(path))}: cannot be locked ({reason(error)}); choose another place with --index"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(file: TextIO, shared: bool) -> None:
    """Lock without waiting, until the file is closed. Raises OSError where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        if not shared:  # which that system's locks cannot be
            file.seek(2**30)  # beyond the text, which others may then read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

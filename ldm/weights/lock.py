"""One writer at a time: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ldm.errors import LdmError
from ldm.weights.io import printable

NAME = "lock"


@contextmanager
def locked(folder: Path, option: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder, alone or together with others that share it. option: where another folder can be given

    The file stays behind and means nothing: what counts is the system's lock on it, so a killed run leaves none that is
    stale. Raises `LdmError` where another process holds it, which is named, and where the folder cannot be written to.
    """
    path = folder / NAME
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _refused(path, "written", error, option) from None
    with file:
        try:
            _lock(file, shared)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = printable(file.read(200).strip()) or "another process"
            raise LdmError(f"{printable(str(folder))}: is being written by {holder}; wait until it ends") from None
        except OSError as error:
            raise _refused(path, "locked", error, option) from None
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        file.flush()
        yield


def _refused(path: Path, what: str, error: OSError, option: str) -> LdmError:
    reason = (error.strerror or str(error)).lower()
    return LdmError(f"{printable(str(path))}: cannot be {what} ({reason}); choose another place with {option}")


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

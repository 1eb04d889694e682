"""Which pictures a folder holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import LdmError
from ldm.pipeline.files import PICTURE_SUFFIXES, reason
from ldm.search.table import Found
from ldm.weights.io import printable


@dataclass(frozen=True)
class Bad:
    """A file or folder that could not be read. path: relative to the folder of pictures."""

    path: str
    reason: str


def scan(folder: Path, index: Path) -> tuple[list[Found], list[Bad]]:
    """All .png, .jpg, .jpeg and .webp files below a folder, by path, and what could not be looked at.

    Hidden files and folders and the index itself are passed over; a link to a file is a file, one to a folder is not
    followed. Raises `LdmError` where `folder` is none.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise LdmError(
            f"{printable(str(folder))}: cannot be read ({reason(error)}); expected a folder of pictures"
        ) from None
    found: list[Found] = []
    bad: list[Bad] = []

    def note(path: str, error: OSError) -> None:
        bad.append(Bad(Path(path).relative_to(folder).as_posix(), f"cannot be read ({reason(error)})"))

    own = index.resolve()
    for here, folders, files in os.walk(folder, onerror=lambda error: note(error.filename, error)):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(here, name).resolve() != own]
        for name in files:
            if name.startswith(".") or not name.lower().endswith(PICTURE_SUFFIXES):
                continue
            path = Path(here, name)
            try:
                status = path.stat()
            except OSError as error:
                note(str(path), error)
            else:
                found.append(Found(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda file: os.fsencode(file.path)), bad

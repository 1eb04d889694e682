"""Bytes on disk, wherever they lie: a file, a member of a tar that is not unpacked, or a cell of a Parquet file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ldm.errors import LdmError, printable


class BytesAt(Protocol):
    """Where bytes lie. Its text names the place; `path` is the file that they are in."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    def read(self, limit: int) -> bytes:
        """The bytes, at most `limit` of them. Raises LdmError, naming the place, where they cannot be had."""
        ...


@dataclass(frozen=True)
class FileAt:
    """A file, or `size` bytes of it from `offset` on.

    A member of a tar is read like any file, in any order: nothing streams, so there is no position to lose.
    """

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self, limit: int) -> bytes:
        """The bytes, at most `limit` of them.

        Raises LdmError, naming the file, for more, for fewer than `size`, and for what is no plain file.
        """
        try:
            if not self.path.is_file():
                raise LdmError(f"{self}: {'is no plain file' if self.path.exists() else 'not found'}; check the path")
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(limit + 1 if self.size is None else min(self.size, limit + 1))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise LdmError(f"{self}: cannot be read ({reason.lower()}); check the file") from None
        if len(data) > limit:
            raise LdmError(f"{self}: found more than {limit / 2**20:.3g} MiB, expected a smaller file")
        if self.size is not None and len(data) < self.size:
            raise LdmError(f"{self}: found {len(data)} bytes, expected {self.size}; it was changed, copy it again")
        return data

    def __str__(self) -> str:
        return printable(f"{self.path}" + (f" at byte {self.offset}" if self.offset else ""))

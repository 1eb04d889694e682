"""Parquet files that hold the pictures themselves, as Hugging Face's datasets are stored and handed on.

A column `image` of {bytes, path}, or of plain bytes, has the pictures; the caption is in `text`, `caption` or `prompt`,
and maybe `mask` and `conditioning_image` hold more of them. Nothing is unpacked: a picture is read from its cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.data.caption_files import CAPTION_COLUMNS, captions_in
from ldm.data.example import Defaults, Example, PictureSet, example_of
from ldm.errors import LdmError, printable

if TYPE_CHECKING:
    import pyarrow

PICTURE, MASK, HINT = "image", "mask", "conditioning_image"


@dataclass(frozen=True)
class CellAt:
    """One picture: its row, from 0, in a group of rows of one file. changed: when the file last was, in nanoseconds."""

    path: Path
    column: str
    group: int
    row: int
    changed: int

    def read(self, limit: int) -> bytes:
        """The bytes, at most `limit` of them. Raises LdmError for more, and where the file was changed meanwhile."""
        try:
            changed = self.path.stat().st_mtime_ns
        except OSError as error:
            raise LdmError(f"{self}: cannot be read ({(error.strerror or str(error)).lower()}); check it") from None
        if changed != self.changed:
            raise LdmError(f"{self}: the file was changed meanwhile; start again")
        with _told(str(self)):
            data = _bytes(_cells(self.path, self.column, self.group, changed)[self.row].as_py())
        if data is None or len(data) > limit:
            found = "no bytes" if data is None else f"more than {limit / 2**20:.3g} MiB"
            raise LdmError(f"{self}: found {found}, expected a picture")
        return data

    def __str__(self) -> str:
        return printable(f"{self.path} {self.column} of row {self.row + 1}, group {self.group + 1}")


def read_parquet(path: Path, name: str, defaults: Defaults) -> PictureSet:
    """The pictures of one file; `name` stands before their rows. No picture's bytes are read yet."""
    examples: list[Example] = []
    left_out: list[str] = []
    try:
        for number, values, cells in _rows(path):
            where = f"{name} row {number}"
            if PICTURE not in cells:
                left_out.append(f"{where}: holds no picture's bytes; remove it, or put the picture in")
                continue
            try:
                picture, mask, hint = cells[PICTURE], cells.get(MASK), cells.get(HINT)
                examples.append(example_of(where, picture, captions_in(values), defaults, mask=mask, hint=hint))
            except LdmError as error:
                left_out.append(f"{where}: {error}")
    except LdmError as error:
        left_out.append(f"{name}: {error}")
    return PictureSet(path, tuple(examples), tuple(left_out))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any], dict[str, CellAt]]]:
    """Each row's number, from 1, its captions, and where its pictures are."""
    parquet = _pyarrow_parquet()
    changed, number = path.stat().st_mtime_ns, 0
    with _told(""):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if PICTURE not in names:
            raise LdmError(f"has no column {PICTURE!r}; found {printable(', '.join(names)[:100])}")
        texts = [column for column in CAPTION_COLUMNS if column in names]
        held = {column: _leaf(file, column) for column in (PICTURE, MASK, HINT) if column in names}
        for group in range(file.num_row_groups):
            filled = {column: _filled(file, group, column, leaf) for column, leaf in held.items()}
            captions = file.read_row_group(group, texts).to_pylist() if texts else []
            for row in range(file.metadata.row_group(group).num_rows):
                number += 1
                cells = {column: CellAt(path, column, group, row, changed) for column in held if filled[column][row]}
                yield number, captions[row] if captions else {}, cells


def _leaf(file: Any, column: str) -> str:
    """Where the bytes of a column are, in Parquet's words. Raises LdmError where it holds none."""
    kind = file.schema_arrow.field(column).type
    held = kind
    if str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0:
        held = kind.field("bytes").type
    if str(held) not in ("binary", "large_binary"):
        raise LdmError(f"its column {column!r} is {printable(str(kind)[:60])}, expected {{bytes, path}} or bytes")
    return column if held is kind else f"{column}.bytes"


def _filled(file: Any, group: int, column: str, leaf: str) -> list[bool]:
    """Which rows of a group have bytes. The file itself mostly says that all have: then none are read for it."""
    rows = file.metadata.row_group(group)
    chunk = next(c for c in map(rows.column, range(rows.num_columns)) if c.path_in_schema == leaf)
    if chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0:
        return [True] * rows.num_rows
    return [_bytes(cell.as_py()) is not None for cell in file.read_row_group(group, [column]).column(0)]


@lru_cache(maxsize=3)
def _cells(path: Path, column: str, group: int, changed: int) -> pyarrow.ChunkedArray:
    """A group's cells of one column, kept while its pictures, masks and hints are read one after the other.

    changed: when the file was, so that another file of this name is not taken for it
    """
    return _pyarrow_parquet().ParquetFile(path).read_row_group(group, [column]).column(0)


def _bytes(cell: Any) -> bytes | None:
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise LdmError("is read by the package pyarrow, which is not installed; pip install pyarrow") from None
    return parquet


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What pyarrow raises for a broken file, as one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = printable(next(iter(str(error).splitlines()), "")[:80])
        said = f"is no whole Parquet file ({reason}); copy it again"
        raise LdmError(f"{where}: {said}" if where else said) from None

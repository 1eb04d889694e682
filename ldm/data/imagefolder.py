"""Tables that name pictures and tell of them: Hugging Face's imagefolder, and kohya's metadata files.

A `metadata.jsonl`, `.csv` or `.parquet` has a row for each picture: `file_name` relative to the table, a caption in
`text`, `caption` or `prompt` (a text or a list of them), and maybe `mask_file_name`, `conditioning_image_file_name`.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.caption_files import CAPTION_COLUMNS, captions_in
from ldm.data.file_at import FileAt
from ldm.data.listing import Listing
from ldm.errors import LdmError, printable

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_COLUMNS = ("file_name", "image_file_name")
MASK_COLUMN, HINT_COLUMN = "mask_file_name", "conditioning_image_file_name"
MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """What tables tell of a picture. Two rows of one picture are its two captions."""

    captions: tuple[str, ...] = ()
    mask: Path | None = None
    hint: Path | None = None


@dataclass(frozen=True)
class Told:
    """rows: by picture; left_out: a line for each row that is of no use; tables: those that were read."""

    rows: Mapping[Path, Row]
    left_out: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()


def read_tables(listing: Listing) -> Told:
    """What all tables in a folder and below tell; in one folder the first of the three kinds alone is read."""
    rows: dict[Path, Row] = {}
    by_letters = {_letters(path): path for path in listing.files} | {str(path): path for path in listing.files}
    left_out: list[str] = []
    tables: dict[Path, Path] = {}
    for path in sorted(
        (path for path in listing.files if path.name in TABLES), key=lambda path: TABLES.index(path.name)
    ):
        if path.parent in tables:
            left_out.append(f"{listing.name(path)}: not read, {tables[path.parent].name} is beside it")
            continue
        tables[path.parent] = path
        for where, values in _values(path):
            where = f"{listing.name(path)}{where}"
            if isinstance(values, str):
                left_out.append(f"{where}: {values}")
                continue
            try:
                picture, row = _row(values, path.parent, by_letters)
            except LdmError as error:
                left_out.append(f"{where}: {error}")
                continue
            known = rows.get(picture, Row())
            rows[picture] = Row(known.captions + row.captions, row.mask or known.mask, row.hint or known.hint)
    return Told(rows, tuple(left_out), tuple(tables.values()))


def _row(values: Mapping[str, Any], folder: Path, files: Mapping[str, Path]) -> tuple[Path, Row]:
    column = next((column for column in IMAGE_COLUMNS if values.get(column)), None)
    if column is None:
        raise LdmError("has no file_name; name the picture in it")
    mask, hint = (
        _inside(values, column, folder, files) if values.get(column) else None for column in (MASK_COLUMN, HINT_COLUMN)
    )
    return _inside(values, column, folder, files), Row(captions_in(values), mask, hint)


def _inside(values: Mapping[str, Any], column: str, folder: Path, files: Mapping[str, Path]) -> Path:
    """The file that a column names. Raises LdmError where it is none of the folder's.

    files: those that are there, by their names and by their letters. A table may have been written on Windows, with
    backslashes, or name letters with accents otherwise than macOS named the files.
    """
    name = values[column]
    if not isinstance(name, str):
        raise LdmError(f"{column} is {printable(repr(name)[:60])}, expected a file's name")
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts:
        raise LdmError(f"{column} {printable(name)[:120]} leaves the folder; move the file into it")
    named = (folder / inner, folder / PurePosixPath(name.replace("\\", "/")))
    return next((file for path in named if (file := files.get(str(path)) or files.get(_letters(path)))), named[0])


def _letters(path: Path) -> str:
    """A path by which letters are in it, however each is composed."""
    return unicodedata.normalize("NFC", str(path))


def _values(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Each row's place in the table, and its values or what is wrong with it."""
    try:
        read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
        yield from read(FileAt(path).read(MAX_BYTES))
    except LdmError as error:
        yield "", str(error)


def _jsonl(data: bytes) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, line in enumerate(_text(data).split("\n"), 1):  # a caption may hold other ends of lines
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            yield f" line {number}", "is not JSON; mend or remove the line"
            continue
        yield f" line {number}", values if isinstance(values, dict) else "is no JSON object; mend or remove the line"


def _csv(data: bytes) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(_text(data), newline=""), strict=True)
    try:
        for values in reader:
            more = None in values  # the values beyond the last column
            yield f" line {reader.line_num}", "has more values than columns; quote the commas" if more else values
    except csv.Error as error:
        yield f" line {reader.line_num}", f"is not CSV ({error}); mend it, all below it is lost"


def _parquet(data: bytes) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise LdmError("is read by the package pyarrow, which is not installed; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(data))
        wanted = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, MASK_COLUMN, HINT_COLUMN}
        columns = [name for name in table.schema_arrow.names if name in wanted]
        rows: Iterable[dict[str, Any]] = table.read(columns).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), "")[:80]
        raise LdmError(f"is no whole Parquet file ({printable(reason)}); copy it again") from None
    for number, values in enumerate(rows, 1):
        yield f" row {number}", values


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LdmError(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None

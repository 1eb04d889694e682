"""Packed picture sets: every picture decoded once, in one array that training maps into memory.

A set is `NAME-SIZE.npy`, uint8 (N, size, size, 3), with `NAME.jsonl` beside it: line i is the record of picture i.
`python -m ldm.data.packed --shards FOLDER --out FOLDER --size 128` makes one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.data.records import RECORD_FIELDS, Record
from ldm.data.shards import decode, fault, read_shards
from ldm.errors import LdmError


def pack(shards: Path, out: Path, size: int, name: str = "pictures", skipped: list[str] | None = None) -> None:
    """Decode every picture of a folder's shards NAME-*.tar once, into NAME-SIZE.npy and NAME.jsonl in `out`.

    A set that is there already and newer than its shards is kept. Memory stays flat, and both files appear whole or
    not at all.

    Args:
        shards: the folder of the shards.
        out: the folder of the packed set.
        size: pixels, the side of the packed pictures.
        name: of the set, and of its shards.
        skipped: as in `read_shards`; pictures that cannot be decoded are among the faults.
    """
    paths = sorted(shards.glob(f"{name}-*.tar"))
    if not paths:
        raise LdmError(f"{shards}: no {name}-*.tar found; name the folder that holds the picture shards")
    if not _is_current(out, size, name, paths):
        write_packed(_decoded(paths, size, skipped), out, size, name)


def open_packed(folder: Path, size: int, name: str = "pictures") -> tuple[np.ndarray, list[Record]]:
    """Map a packed set: pixels uint8 (N, size, size, 3), read-only and not loaded, and its N records.

    Raises LdmError if a file is missing or broken, or if the two do not belong together.
    """
    array_path, records_path = packed_paths(folder, size, name)
    for path in (array_path, records_path):
        if not path.is_file():
            raise LdmError(f"{path}: not found; pack the shards first")
    try:
        pixels = np.load(array_path, mmap_mode="r")
        records = [json.loads(line) for line in records_path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, EOFError) as error:
        raise LdmError(f"{array_path}: not a packed set ({error}); remove it and pack the shards again") from error
    expected = (len(records), size, size, 3)
    if pixels.shape != expected or pixels.dtype != np.uint8:
        raise LdmError(f"{array_path}: {pixels.dtype} {pixels.shape}, expected uint8 {expected}; pack the shards again")
    return pixels, records


def write_packed(pictures: Iterable[tuple[np.ndarray, Record]], folder: Path, size: int, name: str) -> None:
    """Write uint8 pictures (size, size, 3) and their records as a packed set, in one pass."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = packed_paths(folder, size, name)
    array_temp, records_temp = temps = tuple(path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths)
    try:
        with array_temp.open("wb") as array_file, records_temp.open("w", encoding="utf-8") as records_file:
            count = 0
            _write_header(array_file, count, size)
            for pixels, record in pictures:
                array_file.write(np.ascontiguousarray(pixels, np.uint8).tobytes())
                kept = {field: record[field] for field in RECORD_FIELDS if field in record}
                records_file.write(json.dumps(kept, ensure_ascii=False) + "\n")
                count += 1
            array_file.seek(0)
            _write_header(array_file, count, size)
        for temp, path in zip(temps, paths, strict=True):
            temp.replace(path)
    finally:
        for temp in temps:
            temp.unlink(missing_ok=True)


def packed_paths(folder: Path, size: int, name: str = "pictures") -> tuple[Path, Path]:
    """Where the array and the records of a packed set lie."""
    return folder / f"{name}-{size}.npy", folder / f"{name}.jsonl"


def _decoded(paths: list[Path], size: int, skipped: list[str] | None) -> Iterator[tuple[np.ndarray, Record]]:
    for sample in read_shards(paths, skipped):
        try:
            pixels = decode(sample.image, size, sample.name)
        except LdmError as error:
            fault(str(error), skipped)
        else:
            yield pixels, sample.record


def _write_header(file: BinaryIO, count: int, size: int) -> None:
    """The .npy header, written again when the count is known: numpy leaves room in it for the first axis to grow."""
    shape = (count, size, size, 3)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _is_current(folder: Path, size: int, name: str, shards: list[Path]) -> bool:
    try:
        open_packed(folder, size, name)
    except LdmError:
        return False
    oldest = min(path.stat().st_mtime for path in packed_paths(folder, size, name))
    return oldest >= max(path.stat().st_mtime for path in shards)


def main() -> None:
    """The command line."""
    import tyro

    def run(shards: Path, out: Path, size: int, name: str = "pictures") -> None:
        """Decode all pictures of a folder's shards NAME-*.tar into one array of SIZE x SIZE pixels, captions beside."""
        pack(shards, out, size, name)

    try:
        tyro.cli(run, prog="python -m ldm.data.packed")
    except LdmError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()

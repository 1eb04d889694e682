"""The index folder.

    index.json             the record: which CLIP, which folder, which files; replaced last, so it is always true
    vectors-T.npy          (N, P) float32, the pictures' unit vectors, by path
    entries-T.npy, paths-T.npy   the pictures themselves; see table.py
    nearest-T.faiss        the approximate index, where there are many pictures
    piece-T.npz            vectors that a run has saved and that no table holds yet
    report.json            what the last run could not read
    lock                   see ldm.weights.lock

T is random. A file that the record does not name, and that is no piece, was left by a run that was killed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP
from ldm.pipeline.files import read_file, reason
from ldm.search.table import ENTRY, NOT_READ, Listing
from ldm.weights.atomic import replacing
from ldm.weights.io import printable

PLACE = ".ldm-index"
"""The name of an index folder inside the folder of pictures."""
RECORD, REPORT = "index.json", "report.json"
FORMAT = 1
MAX_RECORD = 2**20
_OURS = re.compile(r"(?:(?P<kind>piece|vectors|entries|paths|nearest)-|\.)[0-9a-f]{16}\.(?:npz|npy|faiss|tmp)")


@dataclass(frozen=True)
class Maker:
    """The CLIP that made an index. identity: the same for the same weights; width: of its vectors."""

    name: str
    identity: str
    width: int

    def __str__(self) -> str:
        return f"{printable(self.name)} ({printable(self.identity[:12])}, width {self.width})"


@dataclass(frozen=True)
class Nearest:
    """How neighbours are found.

    kind:    "exact", or what faiss calls the approximate index, as IVF2048,SQ8
    probes:  of how many of its lists a query looks into
    target, recall: the share of the true ten nearest that queries of each sort should find, and did when it was built
    """

    kind: str = "exact"
    probes: int = 0
    target: float = 1.0
    recall: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What an index says of itself.

    folder: of the pictures, as seen from the index folder where it lies in there, else absolute
    files:  name -> bytes; without any the first run has not ended
    """

    clip: Maker
    folder: str
    pictures: int = 0
    files: dict[str, int] = field(default_factory=dict)
    nearest: Nearest = field(default_factory=Nearest)
    format: int = FORMAT


def maker_of(clip: CLIP) -> Maker:
    """What an index remembers of a CLIP."""
    return Maker(clip.name, clip.identity, clip.width)


def folder_as_written(folder: Path, index: Path) -> str:
    """A folder's name for the record: an index that lies in its folder may be moved with it."""
    folder, index = folder.resolve(), index.resolve()
    return os.path.relpath(folder, index) if index.is_relative_to(folder) else str(folder)


def folder_of(index: Path, record: Record) -> Path:
    """Where the pictures are."""
    return Path(os.path.normpath(index / record.folder))


def remedy(index: Path, record: Record | None = None) -> str:
    """How to make an index again."""
    inside = index.name == PLACE
    folder = folder_of(index, record) if record else index.parent if inside else Path("FOLDER")
    place = "" if inside and index.parent.resolve() == folder.resolve() else f" --index {index}"
    return printable(f"make it again: ldm index {folder}{place} --rebuild")


def read_record(index: Path) -> Record | None:
    """The record of an index folder, None where there is none. Raises `LdmError` for one that is broken or newer."""
    path = index / RECORD
    if not path.exists():
        return None
    try:
        told = json.loads(read_file(path, MAX_RECORD))
        version = int(told["format"])
        record = _record(told) if version == FORMAT else None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LdmError(f"{printable(str(path))}: is damaged; {remedy(index)}") from None
    if record is None:
        raise LdmError(f"{printable(str(path))}: found format {version}, expected {FORMAT}; {remedy(index)}")
    return record


def _record(told: Any) -> Record:
    clip, nearest = told["clip"], told["nearest"]
    return Record(
        clip=Maker(str(clip["name"]), str(clip["identity"]), int(clip["width"])),
        folder=str(told["folder"]),
        pictures=int(told["pictures"]),
        files={str(name): int(size) for name, size in told["files"].items()},
        nearest=Nearest(
            kind=str(nearest["kind"]),
            probes=int(nearest["probes"]),
            target=float(nearest["target"]),
            recall={str(name): float(share) for name, share in nearest["recall"].items()},
        ),
    )


def write_record(index: Path, record: Record) -> None:
    """Replace the record."""
    write_json(index / RECORD, asdict(record))


def write_json(path: Path, told: Any) -> None:
    """Replace a JSON file."""
    with replacing(path) as file:
        file.write(json.dumps(told, indent=1).encode())


def check_maker(index: Path, record: Record, clip: CLIP) -> None:
    """Raise `LdmError` that names both where an index is another CLIP's."""
    if record.clip.identity != clip.identity or record.clip.width != clip.width:
        raise LdmError(
            f"{printable(str(index))}: was made with {record.clip}, found {maker_of(clip)}; choose the other with"
            f" --model, or {remedy(index, record)}"
        )


def new_path(index: Path, kind: str, suffix: str) -> Path:
    """A name in the index folder that nobody has."""
    return index / f"{kind}-{secrets.token_hex(8)}{suffix}"


def pieces(index: Path) -> list[Path]:
    """The saved pieces."""
    return sorted(index.glob("piece-*.npz"))


def tidy(index: Path, record: Record | None, *, keep_pieces: bool) -> None:
    """Remove the files of ours that the record does not name. Only under the lock."""
    for path in list(index.iterdir()):
        ours = _OURS.fullmatch(path.name)
        if ours and not (keep_pieces and ours["kind"] == "piece") and path.name not in (record.files if record else ()):
            path.unlink(missing_ok=True)


def read_table(index: Path, record: Record) -> tuple[Listing, np.ndarray]:
    """The table that the record names, mapped. Raises `LdmError` where a file is missing, cut or of another shape."""
    try:
        loaded = {name.partition("-")[0]: _loaded(index / name, size) for name, size in _arrays(record)}
        listing, vectors = Listing(loaded["entries"], loaded["paths"]), loaded["vectors"]
        if listing.entries.dtype != ENTRY or vectors.shape != (record.pictures, record.clip.width):
            raise ValueError("its tables do not fit together")
        if len(listing) != record.pictures or vectors.dtype != np.float32 or int(_last(listing)) != len(listing.paths):
            raise ValueError("its tables do not fit together")
    except NOT_READ as error:
        why = printable(reason(error) if isinstance(error, OSError | ValueError) else f"{error} is missing")
        raise LdmError(f"{printable(str(index))}: the index is damaged ({why}); {remedy(index, record)}") from None
    return listing, vectors


def _arrays(record: Record) -> Iterator[tuple[str, int]]:
    yield from ((name, size) for name, size in record.files.items() if _OURS.fullmatch(name) and name.endswith(".npy"))


def _loaded(path: Path, size: int) -> np.ndarray:
    check_size(path, size)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def check_size(path: Path, size: int) -> None:
    """Raise OSError or ValueError where a file is missing or of another size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(2, f"{path.name} is missing") from None
    if found != size:
        raise ValueError(f"{path.name} has {found} bytes, expected {size}")


def _last(listing: Listing) -> int:
    return int(listing.entries["end"][-1]) if len(listing) else 0

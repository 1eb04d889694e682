"""An index opened for reading: vectors in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.errors import LdmError
from ldm.search import nearest
from ldm.search.store import PLACE, RECORD, Record, check_size, folder_of, pieces, read_record, read_table, remedy
from ldm.search.table import Listing
from ldm.weights.io import printable

if TYPE_CHECKING:
    import faiss

MAX_TOP = 10_000


@dataclass(frozen=True)
class Hit:
    """A picture that was found. score: the cosine of it and the query; path: where it lay when it was indexed."""

    score: float
    path: Path


@dataclass(frozen=True, eq=False)
class Index:
    """An index on disk, mapped: opening it reads next to nothing. Threads may share it.

    vectors: (N, P) float32, the pictures' unit vectors; listing: the pictures, in the same order
    approximate: what faiss searches; None where all vectors are compared
    """

    path: Path
    record: Record
    listing: Listing
    vectors: np.ndarray
    approximate: faiss.IndexIVF | None

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, vectors: np.ndarray, top: int = 10) -> list[list[Hit]]:
        """Unit vectors (Q, P), an array or a tensor -> of each the nearest pictures, best first; at most `top`.

        Raises `LdmError` for a bad `top`, for vectors of another width, and where the index turns out to be damaged.
        """
        scores, rows = self.rows(vectors, top)
        folder = folder_of(self.path, self.record)
        return [
            [
                Hit(float(score), folder / self.listing.path(int(row)))
                for score, row in zip(scores[query], rows[query], strict=True)
                if row >= 0
            ]
            for query in range(len(scores))
        ]

    def rows(self, vectors: np.ndarray, top: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The same as scores and rows (Q, k); row -1 where an approximate search found fewer."""
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.record.clip.width or not np.isfinite(queries).all():
            raise LdmError(
                f"query: found shape {queries.shape}, expected finite vectors of width {self.record.clip.width}"
            )
        if not 1 <= top <= MAX_TOP:
            raise LdmError(f"top: found {top}, expected 1 to {MAX_TOP}")
        top = min(top, len(self))
        if self.approximate is None:
            scores, rows = nearest.exact(self.vectors, queries, top)
        else:
            probes = self.record.nearest.probes
            scores, rows = nearest.approximate(self.approximate, self.vectors, queries, top, probes)
        missing = rows < 0
        if not np.isfinite(scores[~missing]).all() or (self.approximate is None and missing.any()):
            raise LdmError(
                f"{printable(str(self.path))}: the index is damaged (its vectors are not finite);"
                f" {remedy(self.path, self.record)}"
            )
        return scores, rows


def open_index(path: str | Path) -> Index:
    """Open an index folder, or the one in a folder of pictures.

    Raises `LdmError` where there is none, where it is not finished, or damaged: a file missing, cut or broken.
    """
    path = Path(path)
    if not (path / RECORD).exists() and (path / PLACE).is_dir():
        path = path / PLACE
    record = read_record(path)
    if record is None or not record.files:
        raise LdmError(_why_none(path, record))
    try:
        return _opened(path, record)
    except LdmError:
        newer = read_record(path)
        if newer is None or newer == record:
            raise
        return _opened(path, newer)  # a run has replaced the files while we looked


def _why_none(path: Path, record: Record | None) -> str:
    if record is not None or (path.is_dir() and pieces(path)):
        folder = printable(str(folder_of(path, record))) if record else "FOLDER"
        return f"{printable(str(path))}: is not finished; go on with: ldm index {folder}"
    return f"{printable(str(path))}: holds no index; make one: ldm index FOLDER"


def _opened(path: Path, record: Record) -> Index:
    listing, vectors = read_table(path, record)
    approximate = None
    if record.nearest.kind != "exact":
        try:
            approximate = _approximate(path, record)
        except (OSError, ValueError) as error:
            raise LdmError(
                f"{printable(str(path))}: the index is damaged ({printable(str(error))}); {remedy(path, record)}"
            ) from None
    return Index(path, record, listing, vectors, approximate)


def _approximate(path: Path, record: Record) -> faiss.IndexIVF:
    name = next((name for name in record.files if name.endswith(".faiss")), None)
    if name is None:
        raise ValueError("its record names no approximate index")
    check_size(path / name, record.files[name])
    index = nearest.read(path / name)
    if (index.ntotal, index.d) != (record.pictures, record.clip.width):
        raise ValueError(f"{name} is of another table")
    return index


def combined(plus: Sequence[np.ndarray], minus: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Unit vectors (P,) added and taken away -> one unit vector (1, P). Raises `LdmError` where nothing is left."""
    total = np.stack([*plus, *(-vector for vector in minus)]).sum(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(total))
    if length < 1e-3:
        raise LdmError("query: its parts cancel out; expected words or a picture to look for")
    return (total[None] / length).astype(np.float32)

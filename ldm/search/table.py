"""A table of pictures: of each its path, what tells that it changed, and its vector; in memory and on disk.

N pictures, P width of the vectors, M bytes of all paths together. On disk everything is plain NumPy arrays, which can
be memory-mapped: a table of a million opens at once.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.weights.atomic import replacing

ENTRY = np.dtype([("size", "<i8"), ("modified", "<i8"), ("hash", "V32"), ("end", "<i8")])
"""size: bytes; modified: ns; hash: SHA-256 of the file; end: where the path ends among the bytes of all paths."""

NOT_READ = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What NumPy raises for a file that is cut or broken."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file as the folder lists it. path: relative to the folder; modified: in ns."""

    path: str
    size: int
    modified: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that was read. hash: the SHA-256 of its content."""

    found: Found
    hash: bytes


@dataclass(frozen=True, eq=False)
class Listing:
    """Many pictures in two arrays. entries: (N,) of ENTRY; paths: (M,) uint8, the paths' bytes one after another."""

    entries: np.ndarray
    paths: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, row: int) -> str:
        """The path of one picture."""
        begin = int(self.entries["end"][row - 1]) if row else 0
        return os.fsdecode(self.paths[begin : int(self.entries["end"][row])].tobytes())

    def pictures(self) -> Iterator[Picture]:
        """All pictures, in order."""
        joined, begin = self.paths.tobytes(), 0
        for size, modified, digest, end in self.entries.tolist():
            yield Picture(Found(os.fsdecode(joined[begin:end]), size, modified), digest)
            begin = end


def listing_of(pictures: Sequence[Picture]) -> Listing:
    """Pictures -> their arrays, in the same order."""
    paths = [os.fsencode(picture.found.path) for picture in pictures]
    entries = np.zeros(len(pictures), ENTRY)
    entries["size"] = [picture.found.size for picture in pictures]
    entries["modified"] = [picture.found.modified for picture in pictures]
    entries["hash"] = [np.void(picture.hash) for picture in pictures]
    entries["end"] = np.cumsum([len(path) for path in paths], dtype=np.int64)
    return Listing(entries, np.frombuffer(b"".join(paths), np.uint8))


def write_piece(path: Path, identity: str, listing: Listing, vectors: np.ndarray) -> None:
    """A small table in one file, whole and on disk or not there. identity: of the CLIP that made the vectors."""
    with replacing(path) as file:
        maker = np.frombuffer(identity.encode(), np.uint8)
        np.savez(file, identity=maker, entries=listing.entries, paths=listing.paths, vectors=vectors)


def read_piece(path: Path, identity: str, width: int) -> tuple[Listing, np.ndarray] | None:
    """A small table and its vectors; None where it is damaged, or not by this CLIP."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            listing = Listing(stored["entries"], stored["paths"])
            vectors = stored["vectors"]
            same = stored["identity"].tobytes() == identity.encode()
    except NOT_READ:
        return None
    fits = listing.entries.dtype == ENTRY and vectors.shape == (len(listing), width)
    return (listing, vectors) if same and fits else None


def write_array(path: Path, array: np.ndarray) -> None:
    """An array as .npy, on disk for certain."""
    with path.open("xb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def empty_vectors(path: Path, count: int, width: int) -> np.memmap:
    """A new .npy file of (count, width) zeros in float32, mapped for writing.

    The zeros are written, so that a full disk is an error here: a mapped file that outgrows the disk kills the process.
    """
    chunk = np.zeros((min(count, 65536), width), np.float32)
    with path.open("xb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for begin in range(0, count, 65536):
            file.write(chunk[: count - begin].tobytes())
        file.flush()
        os.fsync(file.fileno())
    return np.load(path, mmap_mode="r+")

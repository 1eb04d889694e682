"""Pictures to vectors: files are read and decoded by threads while the CLIP works on the batch before.

B pictures of a batch, P width of the vectors.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline.clip.model import BATCH, CLIP
from ldm.pipeline.files import read_file
from ldm.pipeline.images import LARGE_BYTES, read_shrunk
from ldm.search.scan import Bad
from ldm.search.table import Found, Picture

ENOUGH = 512
"""Pixels of the shorter side above which a picture is brought nearer to it before it waits for the CLIP."""

AHEAD = 2 * BATCH
"""Pictures that are decoded ahead of the CLIP."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What became of some files. vectors: (B, P) float32, unit, of `pictures`; seen: how many of them the CLIP saw."""

    pictures: list[Picture]
    vectors: np.ndarray
    bad: list[Bad]
    seen: int


@dataclass(frozen=True)
class _Read:
    found: Found
    hash: bytes = b""
    image: Image.Image | None = None
    known: bool = False
    problem: str | None = None


def embed(
    clip: CLIP, folder: Path, files: Sequence[Found], known: Callable[[bytes], np.ndarray | None]
) -> Iterator[Batch]:
    """Files -> batches, in order. A file whose content has a known vector, (P,), is neither decoded nor embedded."""

    def read(found: Found) -> _Read:
        return _read(folder, found, known)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            waiting: deque[Future[_Read]] = deque()
            batch: list[_Read] = []
            for found in files:
                waiting.append(pool.submit(read, found))
                if len(waiting) >= AHEAD:
                    batch.append(waiting.popleft().result())
                if len(batch) == BATCH:
                    yield _embedded(clip, batch, known)
                    batch = []
            while waiting:
                batch.append(waiting.popleft().result())
                if len(batch) == BATCH or not waiting:
                    yield _embedded(clip, batch, known)
                    batch = []
        finally:
            pool.shutdown(cancel_futures=True)


def vectors_of(clip: CLIP, images: Sequence[Image.Image]) -> np.ndarray:
    """RGB pictures -> unit vectors (B, P) in float32, just as they are in an index."""
    return clip.image_vectors([_thinned(image) for image in images]).numpy()


def _read(folder: Path, found: Found, known: Callable[[bytes], np.ndarray | None]) -> _Read:
    try:
        data = read_file(folder / found.path, LARGE_BYTES)
        digest = hashlib.sha256(data).digest()
        if known(digest) is not None:
            return _Read(found, digest, known=True)
        return _Read(found, digest, _thinned(read_shrunk(data)))
    except LdmError as error:
        told = str(error).removeprefix(f"{folder / found.path}: ").removeprefix("image: ")
        return _Read(found, problem=told)


def _thinned(image: Image.Image) -> Image.Image:
    """A large picture made smaller by a whole factor, so that many fit into memory; a CLIP looks at less still."""
    factor = min(image.size) // ENOUGH
    return image.reduce(factor) if factor > 1 else image


def _embedded(clip: CLIP, batch: Sequence[_Read], known: Callable[[bytes], np.ndarray | None]) -> Batch:
    bad = [Bad(read.found.path, read.problem) for read in batch if read.problem is not None]
    new = [(read, read.image) for read in batch if read.image is not None]
    try:
        vectors = vectors_of(clip, [image for _, image in new])
    except LdmError:  # by one of them; find out which
        new, vectors, refused = _one_by_one(clip, new)
        bad += refused
    pictures = [Picture(read.found, read.hash) for read, _ in new]
    for read in batch:
        if read.known:
            pictures.append(Picture(read.found, read.hash))
    old = [vector for read in batch if read.known and (vector := known(read.hash)) is not None]
    return Batch(pictures, np.concatenate([vectors, *(vector[None] for vector in old)]), bad, len(new))


def _one_by_one(
    clip: CLIP, new: Sequence[tuple[_Read, Image.Image]]
) -> tuple[list[tuple[_Read, Image.Image]], np.ndarray, list[Bad]]:
    taken: list[tuple[_Read, Image.Image]] = []
    vectors: list[np.ndarray] = [np.zeros((0, clip.width), np.float32)]
    bad: list[Bad] = []
    for read, image in new:
        try:
            vectors.append(vectors_of(clip, [image]))
            taken.append((read, image))
        except LdmError as error:
            bad.append(Bad(read.found.path, str(error).removeprefix("image: ")))
    return taken, np.concatenate(vectors), bad

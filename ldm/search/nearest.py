"""The nearest vectors by inner product: exactly up to a size, above it by an approximate index of faiss.

N pictures, Q queries, P width, k neighbours. All vectors are unit vectors in float32, so an inner product is a cosine.

The approximate index is an inverted file (Jegou, Douze & Schmid 2011): the vectors are split among lists by k-means,
and a query looks only into the lists whose centres are nearest. Lists hold codes of a byte a number, or product codes
where memory is short; what they propose is ranked anew by the vectors themselves, so scores are exact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ldm.errors import LdmError

if TYPE_CHECKING:
    import faiss

EXACT_UP_TO = 100_000
"""Pictures: so many are compared one by one in a few milliseconds."""
TARGET = 0.95
"""The share of the true ten nearest to be found."""
NEIGHBOURS = 10
SAMPLES = 128
"""Queries of each sort that the share is measured with."""
PER_LIST = 64
"""Vectors for each centre to learn from."""
ROUNDS = 10
"""Of k-means."""
CHUNK = 65_536
"""Vectors that are added at a time."""


def exact(vectors: np.ndarray, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """vectors (N, P), which may be mapped, and queries (Q, P) -> scores and rows (Q, k), best first; k <= N."""
    found = _faiss().knn(queries, vectors, min(top, len(vectors)), metric=_faiss().METRIC_INNER_PRODUCT)
    return found[0], found[1]


def kind_for(count: int, width: int, memory: int) -> str:
    """The approximate index for N vectors of width P, as faiss writes it, on a machine with `memory` bytes.

    About 4 sqrt(N) lists; codes of P bytes as long as they fill at most a quarter of the memory, else of about P / 4.
    """
    lists = 2 ** round(np.log2(4 * count**0.5))
    if count * width <= memory / 4:
        return f"IVF{lists},SQ8"
    parts = max(m for m in range(1, max(1, width // 4) + 1) if width % m == 0)
    return f"IVF{lists},PQ{parts}np"  # np: codes are not put in an order for a search of bits, which takes long


def memory_bytes() -> int:
    """What this machine has; 8 GiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30


def train(vectors: np.ndarray, kind: str) -> faiss.IndexIVF:
    """An index of this kind over vectors (N, P), which may be mapped; the same vectors give the same index."""
    index = _faiss().index_factory(vectors.shape[1], kind, _faiss().METRIC_INNER_PRODUCT)
    index.cp.niter = ROUNDS
    if hasattr(index, "pq"):
        index.pq.cp.niter = ROUNDS
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, PER_LIST  # a word about few goes to stderr
    index.train(some(vectors, PER_LIST * index.nlist))
    for begin in range(0, len(vectors), CHUNK):
        index.add(np.ascontiguousarray(vectors[begin : begin + CHUNK]))
    return index


def some(vectors: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Vectors drawn without repetition, in their order; all where there are no more."""
    if count >= len(vectors):
        return np.ascontiguousarray(vectors)
    rows = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    return np.ascontiguousarray(vectors[np.sort(rows)])


def sample_queries(vectors: np.ndarray, texts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What an index is tried with: its own pictures, sums of two, and texts (Q, P) where there are some.

    Texts matter: CLIP puts them elsewhere in the space than pictures, so other lists are near to them.
    """
    pictures = some(vectors, SAMPLES)
    sums = pictures + some(vectors, SAMPLES, seed=1)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    queries = {"pictures": pictures, "sums": (sums / np.maximum(lengths, 1e-6)).astype(np.float32)}
    return queries if texts is None or not len(texts) else {**queries, "texts": texts}


def tune(
    index: faiss.IndexIVF, vectors: np.ndarray, samples: Mapping[str, np.ndarray], target: float = TARGET
) -> tuple[int, dict[str, float]]:
    """In how many lists queries of each sort find the target share of their ten nearest, and what share each finds.

    The number is the least that does, within an eighth; all lists where nothing less does.
    """
    top = min(NEIGHBOURS + 1, len(vectors))
    truth = {name: exact(vectors, queries, top)[0] for name, queries in samples.items()}

    def shares(probes: int) -> dict[str, float]:
        found = {name: approximate(index, vectors, queries, top, probes)[0] for name, queries in samples.items()}
        return {name: share_found(truth[name], found[name], name == "pictures") for name in samples}

    enough = 1
    while min((reached := shares(enough)).values()) < target and enough < index.nlist:
        enough = min(2 * enough, index.nlist)
    few, step = enough // 2, enough // 8
    while step and enough - few > step:
        middle = (few + enough) // 2
        if min((between := shares(middle)).values()) >= target:
            enough, reached = middle, between
        else:
            few = middle
    return enough, reached


def share_found(truth: np.ndarray, found: np.ndarray, itself: bool = False) -> float:
    """Recall from the true scores and the found ones, (Q, k + 1) both: how many of the found are as good as the k-th.

    itself: the query is among the vectors; it finds itself, which does not count, and k others are asked for.
    """
    k = truth.shape[1] - (not itself)
    good = (found[:, :k] >= truth[:, k - 1 : k] - 1e-6).sum(axis=1)
    return float(np.mean((good - itself) / (k - itself)))


def approximate(
    index: faiss.IndexIVF, vectors: np.ndarray, queries: np.ndarray, top: int, probes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same as `exact`, of what `probes` lists hold; missing ones have row -1 and score -inf."""
    parameters = _faiss().SearchParametersIVF(nprobe=probes)
    _, proposed = index.search(queries, min(max(100, 5 * top), len(vectors)), params=parameters)
    rows = np.full((len(queries), top), -1)
    scores = np.full((len(queries), top), -np.inf, np.float32)
    for query, candidates in enumerate(proposed):
        candidates = np.sort(candidates[(candidates >= 0) & (candidates < len(vectors))])
        exactly = vectors[candidates] @ queries[query]
        best = np.argsort(-exactly, kind="stable")[:top]
        rows[query, : len(best)], scores[query, : len(best)] = candidates[best], exactly[best]
    return scores, rows


def write(index: faiss.IndexIVF, file: BinaryIO) -> None:
    """Write an index into a file."""
    _faiss().write_index(index, _faiss().PyCallbackIOWriter(file.write))


def read(path: Path) -> faiss.IndexIVF:
    """An index from a file, its lists mapped. Raises ValueError where it is no such index."""
    try:
        return _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP)
    except (RuntimeError, MemoryError):
        raise ValueError(f"{path.name} is no index of faiss") from None


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise LdmError("search: the package faiss is not installed; pip install -e '.[search]'") from None
    return faiss

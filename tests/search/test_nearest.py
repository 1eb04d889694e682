"""Neighbours: exact ones against NumPy, approximate ones against exact ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_clip import draw, fake_clip, gallery

from ldm.errors import LdmError
from ldm.search import combined, nearest, open_index, update

COUNT, WIDTH = 20_000, 64


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit vectors around 300 centres, which are the same for all seeds."""
    centres = np.random.default_rng(0).standard_normal((300, WIDTH))
    random = np.random.default_rng(seed)
    return unit(centres[random.integers(0, 300, count)] + 0.5 * random.standard_normal((count, WIDTH)))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(COUNT, 1)


def recall(found: np.ndarray, vectors: np.ndarray, queries: np.ndarray, top: int = 10) -> float:
    """By rows and by sorting everything, unlike what is tested."""
    truth = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :top]
    return float(np.mean([len(set(f) & set(t)) / top for f, t in zip(found.tolist(), truth.tolist(), strict=True)]))


def test_exact_is_exact(vectors: np.ndarray) -> None:
    queries = clustered(50, 2)
    scores, rows = nearest.exact(vectors, queries, 10)
    assert recall(rows, vectors, queries) == 1
    np.testing.assert_allclose(scores, np.sort(queries @ vectors.T, axis=1)[:, :-11:-1], atol=1e-6)
    assert nearest.exact(vectors[:3], queries, 10)[1].shape == (50, 3)


@pytest.mark.parametrize(
    ("count", "memory", "kind"),
    [(COUNT, 2**40, "IVF512,SQ8"), (5000, 2**20, "IVF256,PQ16np")],
    ids=["bytes", "product codes"],
)
def test_approximate_finds_its_target(vectors: np.ndarray, count: int, memory: int, kind: str, tmp_path: Path) -> None:
    vectors = vectors[:count]
    assert nearest.kind_for(count, WIDTH, memory) == kind
    index = nearest.train(vectors, kind)
    probes, told = nearest.tune(index, vectors, nearest.sample_queries(vectors, clustered(100, 3)))
    assert set(told) == {"pictures", "sums", "texts"} and min(told.values()) >= nearest.TARGET
    assert probes < index.nlist / 2, "it looks into a part of the lists only"
    if probes > 1:
        fewer = nearest.approximate(index, vectors, clustered(200, 4), 10, 1)[1]
        assert recall(fewer, vectors, clustered(200, 4)) < 1
    queries = clustered(200, 4)
    scores, rows = nearest.approximate(index, vectors, queries, 10, probes)
    assert recall(rows, vectors, queries) >= nearest.TARGET - 0.03
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, 1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()

    with (tmp_path / "a.faiss").open("wb") as file:
        nearest.write(index, file)
    mapped = nearest.read(tmp_path / "a.faiss")
    np.testing.assert_array_equal(nearest.approximate(mapped, vectors, queries, 10, probes)[1], rows)
    (tmp_path / "b.faiss").write_bytes(b"no index" * 100)
    with pytest.raises(ValueError, match="no index of faiss"):
        nearest.read(tmp_path / "b.faiss")


def test_the_same_vectors_train_the_same_index(vectors: np.ndarray) -> None:
    one, other = (nearest.train(vectors[:3000], "IVF64,SQ8") for _ in range(2))
    rows = [nearest.approximate(index, vectors[:3000], clustered(50, 4), 10, 2)[1] for index in (one, other)]
    np.testing.assert_array_equal(*rows)


def test_fewer_found_than_asked_for(vectors: np.ndarray) -> None:
    index = nearest.train(vectors[:3000], "IVF64,SQ8")
    scores, rows = nearest.approximate(index, vectors[:3000], vectors[:1], 2500, 1)
    found = int((rows >= 0).sum())
    assert 0 < found < 2500 and (rows[0, found:] == -1).all() and np.isneginf(scores[0, found:]).all()


def test_the_share_that_is_found() -> None:
    truth = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
    found = np.array([[0.9, 0.7, 0.6, 0.5, 0.4]], np.float32)
    assert nearest.share_found(truth, truth) == 1
    assert nearest.share_found(truth, found) == 3 / 4  # of the best four; 0.8 was missed
    assert nearest.share_found(truth, found, itself=True) == 3 / 4  # of the four besides itself
    tied = np.array([[0.9, 0.8, 0.6, 0.6, 0.6]], np.float32)
    assert nearest.share_found(tied, tied) == 1


def test_the_kind_by_size() -> None:
    assert nearest.kind_for(1_000_000, 192, 16 * 2**30) == "IVF4096,SQ8"
    assert nearest.kind_for(100_000_000, 768, 16 * 2**30) == "IVF32768,PQ192np"
    assert nearest.kind_for(1_000_000, 7, 0).endswith("PQ1np")
    assert nearest.memory_bytes() > 2**28


def test_sums_of_unit_vectors() -> None:
    a, b = np.eye(2, 3, dtype=np.float32)
    np.testing.assert_allclose(combined([a, b]), [[0.5**0.5, 0.5**0.5, 0]], atol=1e-6)
    np.testing.assert_allclose(combined([a], [b]), [[0.5**0.5, -(0.5**0.5), 0]], atol=1e-6)
    with pytest.raises(LdmError, match="its parts cancel out"):
        combined([a, b], [a, b])


def test_a_large_index_answers_as_an_exact_one(tmp_path: Path) -> None:
    """The whole way: with so few lists looked into as reach the target, a small set gives the same answers."""
    folder = gallery(tmp_path / "pictures", 150)
    update(folder, tmp_path / "exact", fake_clip())
    report = update(folder, tmp_path / "large", fake_clip(), exact_up_to=100, texts=["red", "blue"])
    assert report.nearest is not None and report.nearest.kind == "IVF64,SQ8"
    assert set(report.nearest.recall) == {"pictures", "sums", "texts"}
    exact, large = open_index(tmp_path / "exact"), open_index(tmp_path / "large")
    assert exact.record.nearest.kind == "exact" and large.record.nearest == report.nearest
    same = [
        len({hit.path for hit in one} & {hit.path for hit in other}) / 10
        for one, other in zip(exact.search(exact.vectors, 10), large.search(exact.vectors, 10), strict=True)
    ]
    assert np.mean(same) > 0.9
    draw(folder / "one more.png", 4321)
    update(folder, tmp_path / "large", fake_clip(), exact_up_to=100)
    assert open_index(tmp_path / "large").search(large.vectors[:1], 1)[0][0].score == pytest.approx(1, abs=1e-5)
    assert len(list((tmp_path / "large").glob("nearest-*"))) == 1

"""Principal components against numpy's covariance, of sets whose rank is known; and their file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.pipeline.clip.components import components_of, read_components, save_components


def of_rank(rank: int, count: int = 40, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    weights = torch.randn(count, rank, generator=generator) * torch.arange(rank, 0, -1)
    return weights @ torch.randn(rank, width, generator=generator) + torch.randn(width, generator=generator)


def test_they_are_the_eigenvectors_of_the_covariance():
    vectors = of_rank(16)
    found = components_of(vectors)
    values, basis = np.linalg.eigh(np.cov(vectors.double().numpy().T))
    torch.testing.assert_close(found.variances.double(), torch.from_numpy(values[::-1].copy()), rtol=1e-4, atol=1e-5)
    overlap = found.components.double() @ torch.from_numpy(basis[:, ::-1].copy())
    torch.testing.assert_close(overlap.abs(), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_set_of_low_rank_is_whole_at_its_rank_and_the_error_falls_until_there(rank):
    vectors = of_rank(rank)
    found = components_of(vectors)
    assert len(found.components) == rank
    errors = [float((found.first(vectors, count) - vectors).norm()) for count in range(rank + 1)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    torch.testing.assert_close(found.first(vectors, rank), vectors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.first(vectors, 0), vectors.mean(dim=0).expand_as(vectors), rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_the_variance_of_the_rest():
    vectors = of_rank(8)
    found = components_of(vectors)
    for count in (0, 2, 5):
        lost = float((found.first(vectors, count) - vectors).square().sum()) / (len(vectors) - 1)
        assert lost == pytest.approx(float(found.variances[count:].sum()), rel=1e-3)


def test_two_vectors_have_one_component():
    assert len(components_of(of_rank(16, count=2)).components) == 1


@pytest.mark.parametrize(("count", "message"), [(1, "found 1 picture"), (0, "found 0 picture")])
def test_too_few(count, message):
    with pytest.raises(LdmError, match=message):
        components_of(of_rank(4)[:count])


def test_all_the_same():
    with pytest.raises(LdmError, match="all the same to CLIP"):
        components_of(of_rank(4)[:1].expand(5, -1))


def test_the_file_gives_them_back(tmp_path: Path):
    found, path = components_of(of_rank(5)), tmp_path / "pca.safetensors"
    save_components(found, path)
    again = read_components(path)
    for name in ("mean", "components", "variances"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert set(load_file(path)) == {"mean", "components", "variances"}


@pytest.mark.parametrize(
    "change",
    [
        {"components": torch.zeros(5, 15)},
        {"components": torch.zeros(0, 16), "variances": torch.zeros(0)},
        {"variances": torch.zeros(4)},
        {"mean": torch.zeros(1, 16)},
        {"mean": None},
        {"mean": torch.full((16,), torch.nan)},
    ],
)
def test_a_file_that_is_none(change, tmp_path: Path):
    found, path = components_of(of_rank(5)), tmp_path / "other.safetensors"
    given = {"mean": found.mean, "components": found.components, "variances": found.variances} | change
    save_file({name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}, path)
    with pytest.raises(LdmError, match=r"other.safetensors: holds (no principal components|numbers that)"):
        read_components(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(LdmError, match=r"gone.safetensors"):
        read_components(tmp_path / "gone.safetensors")

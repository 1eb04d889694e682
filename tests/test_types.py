"""The record that tells a network what to draw."""

from __future__ import annotations

import pytest
import torch

from ldm.types import Conditioning


def full(batch: int, start: int = 0) -> Conditioning:
    """Every part given; row i of each tensor is filled with start + i."""

    def rows(*shape: int) -> torch.Tensor:
        return (torch.arange(batch) + start).float().view(-1, *[1] * len(shape)).expand(batch, *shape).clone()

    return Conditioning(rows(5, 8), rows(6), rows(2, 4, 4), (rows(3, 4, 4), rows(3, 2, 2)))


def tensors(cond: Conditioning) -> list[torch.Tensor]:
    return [t for t in (cond.cross, cond.vector, cond.concat, *cond.control) if t is not None]


def row_numbers(cond: Conditioning) -> list[list[float]]:
    """The number that fills each row, tensor by tensor."""
    return [t.flatten(1)[:, 0].tolist() for t in tensors(cond)]


def test_stack_joins_rows_in_order():
    stacked = Conditioning.stack([full(2), full(1, start=7), full(2, start=4)])
    assert row_numbers(stacked) == [[0, 1, 7, 4, 5]] * 5
    assert [t.shape[1:] for t in tensors(stacked)] == [t.shape[1:] for t in tensors(full(1))]


def test_stack_leaves_absent_parts_absent():
    stacked = Conditioning.stack([Conditioning(cross=torch.zeros(1, 5, 8))] * 2)
    assert stacked.cross is not None and stacked.cross.shape == (2, 5, 8)
    assert (stacked.vector, stacked.concat, stacked.control) == (None, None, ())
    assert Conditioning.stack([Conditioning(), Conditioning()]) == Conditioning()


@pytest.mark.parametrize("part", ["cross", "vector", "concat"])
def test_stack_refuses_parts_that_only_some_have(part):
    with pytest.raises(ValueError, match=f"only some have '{part}'"):
        Conditioning.stack([full(1), full(1).with_(**{part: None})])


@pytest.mark.parametrize("control", [(), (torch.zeros(1, 3, 4, 4),)], ids=["none", "fewer levels"])
def test_stack_refuses_other_control(control):
    with pytest.raises(ValueError, match="only some have 'control'"):
        Conditioning.stack([full(1), full(1).with_(control=control)])


@pytest.mark.parametrize(
    ("index", "expected"),
    [(slice(1, 3), [1, 2]), (torch.tensor([2, 0]), [2, 0]), (torch.tensor([True, False, True]), [0, 2])],
    ids=["slice", "numbers", "mask"],
)
def test_select_takes_rows(index, expected):
    assert row_numbers(full(3).select(index)) == [expected] * 5


def test_select_undoes_stack():
    stacked = Conditioning.stack([full(2), full(1, start=7)])
    assert row_numbers(stacked.select(slice(0, 2))) == row_numbers(full(2))
    assert row_numbers(stacked.select(slice(2, 3))) == row_numbers(full(1, start=7))


def test_repeat_keeps_copies_of_a_row_together():
    assert row_numbers(full(2).repeat(3)) == [[0, 0, 0, 1, 1, 1]] * 5


def test_to_casts_numbers_but_not_labels():
    cond = full(2).with_(vector=torch.tensor([3, 4])).to(dtype=torch.bfloat16)
    assert cond.vector is not None and cond.vector.dtype == torch.int64
    assert {t.dtype for t in tensors(cond) if t is not cond.vector} == {torch.bfloat16}
    assert {t.device.type for t in tensors(full(2).to("meta"))} == {"meta"}


def test_with_replaces_one_part_and_leaves_the_original():
    cond = full(1)
    changed = cond.with_(cross=None)
    assert changed.cross is None and changed.vector is cond.vector
    assert cond.cross is not None

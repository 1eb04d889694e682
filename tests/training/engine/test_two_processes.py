"""Two processes take the steps that one takes that accumulates twice as much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from together import run_together
from two_ranks import STOP_AT, TWICE, trained

from ldm.training.engine.figures import read_figures
from ldm.training.engine.state import load_state

HERE = Path(__file__).parent
ALONE = replace(TWICE, accumulate=2 * TWICE.accumulate, workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left behind."""
    folder = tmp_path_factory.mktemp("two")
    run_together(str(HERE / "two_ranks.py"), str(folder), folders=[HERE])
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree"])
def test_two_are_one_that_accumulates_twice_as_much(folder: Path, tmp_path: Path, optimizer: str) -> None:
    alone = trained(replace(ALONE, optimizer=optimizer), tmp_path)  # type: ignore[arg-type]
    ranks = [load_file(folder / f"{optimizer}-{rank}.safetensors") for rank in range(2)]
    for name, weight in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name}: the ranks have grown apart"
        assert torch.allclose(ranks[0][name], weight, atol=1e-6), name
    ours, theirs = read_figures(tmp_path), read_figures(folder / optimizer)
    assert [(f.step, f.of) for f in ours] == [(f.step, f.of) for f in theirs] != []
    for one, other in zip(ours, theirs, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-4)


def test_two_that_see_the_same_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """So the test above would see ranks that draw the same batches."""
    other = trained(TWICE, tmp_path)
    two = load_file(folder / "adamw-0.safetensors")
    assert not torch.allclose(two["layer.2.weight"], other["layer.2.weight"], atol=1e-4)


def test_parts_are_trained_as_a_whole_is(folder: Path) -> None:
    """Looks with the averaged weights on the way included: the steps after them go on from the trained ones."""
    whole = load_file(folder / "adamw-0.safetensors")
    for name in ("split-0", "split-1", "resumed-0"):
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == whole.keys()
        assert all(torch.allclose(found[key], weight, atol=1e-6) for key, weight in whole.items()), name
    split, resumed = (load_file(folder / f"{name}-0.safetensors") for name in ("split", "resumed"))
    assert all(torch.equal(split[key], weight) for key, weight in resumed.items())
    ours, theirs = read_figures(folder / "split"), read_figures(folder / "adamw")
    assert [(f.step, f.of) for f in ours] == [(f.step, f.of) for f in theirs] != []
    for one, other in zip(ours, theirs, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-4)


@pytest.mark.parametrize("name", ["stopped", "stopped-split"])
def test_what_two_began_one_may_finish(folder: Path, tmp_path: Path, name: str) -> None:
    state = load_state(folder / name)
    assert state is not None and state.step == STOP_AT
    resumed, whole = trained(ALONE, folder / name), trained(ALONE, tmp_path)
    assert all(torch.allclose(resumed[name], weight, atol=1e-6) for name, weight in whole.items())

"""Two processes that train together do what one does on the joint batch, and stop together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clip_ranks import CASES, LOOP, STOP_AT, joint_batch
from safetensors.torch import load_file
from test_clip import close, objective_of
from together import run_together

from ldm.errors import LdmError
from ldm.training.engine.loop import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    for loss in ("softmax", "sigmoid"):
        torch.save(joint_batch(objective_of(loss)), folder / f"{loss}.pt")
    run_together(str(HERE / "clip_ranks.py"), str(folder), folders=[HERE])
    return folder


@pytest.mark.parametrize(("loss", "chunks"), CASES)
def test_gathered_loss_and_gradients_are_those_of_the_joint_batch(folder: Path, loss: str, chunks: int) -> None:
    objective = objective_of(loss)  # type: ignore[arg-type]
    result = objective(joint_batch(objective))["loss"]
    result.backward()
    ranks = [load_file(folder / f"{loss}-{chunks}-{rank}.safetensors") for rank in range(2)]
    assert float(ranks[0]["loss"] + ranks[1]["loss"]) / 2 == pytest.approx(result.item(), rel=1e-6)
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        for found in ranks:
            assert close(found[name], parameter.grad), name


def test_one_rank_alone_has_other_gradients(folder: Path) -> None:
    """So the test above would see negatives that were not gathered."""
    objective = objective_of()
    batch = joint_batch(objective)
    for rank in range(2):
        (objective({name: tensor.chunk(2)[rank] for name, tensor in batch.items()})["loss"] / 2).backward()
    gathered, name = load_file(folder / "softmax-1-0.safetensors"), "model.visual.proj"
    grad = dict(objective.named_parameters())[name].grad
    assert grad is not None and not torch.allclose(gathered[name], grad, rtol=0.1)


def test_a_signal_to_one_rank_stops_both_and_resuming_changes_nothing(folder: Path) -> None:
    assert [(folder / f"stopped-{rank}").read_text() for rank in range(2)] == ["143", "143"]
    assert (folder / "saves").read_text() == f"step-{STOP_AT:08d}"
    whole, other, parts = (load_file(folder / f"{name}.safetensors") for name in ("whole-0", "whole-1", "parts-1"))
    for name, weight in whole.items():
        assert torch.equal(weight, other[name]), f"{name}: the ranks have grown apart"
        assert torch.equal(weight, parts[name]), f"{name}: another run"


def test_the_first_rank_alone_says_that_it_has_stopped(folder: Path) -> None:
    said = [(folder / f"log-{rank}").read_text().count(f"stopped at step {STOP_AT}, saved") for rank in range(2)]
    assert said == [1, 0]


def test_the_first_rank_prepares_files_while_the_other_waits(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("entered-*")) == ["entered-0-of-0", "entered-1-of-1"]


def test_a_run_of_two_is_not_resumed_by_one(folder: Path) -> None:
    with pytest.raises(LdmError, match=r"begun with processes = 2, now 1"):
        train(objective_of(), LOOP, folder / "whole")

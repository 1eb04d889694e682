"""What is measured before a run begins."""

from __future__ import annotations

import pytest
import torch

from ldm.layers.convolution import ResBlock
from ldm.training.tune.plan import plan
from ldm.training.tune.run import Run


def test_checkpointing_is_part_of_what_is_measured(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    forward = ResBlock.forward
    monkeypatch.setattr(ResBlock, "forward", lambda *told: (calls.append(True), forward(*told))[1])
    plan(small_run.objective, small_run.loop, small_run.kept, 0, 1)
    plainly = len(calls)
    calls.clear()
    plan(small_run.objective, small_run.loop, small_run.kept, 0, 1, less_memory=True)
    unlearned = 2  # forwards of the first block, before which there is no adapter: nothing is computed again for it
    assert plainly > 0 and len(calls) == 2 * plainly - unlearned
    assert all(p.grad is None for p in small_run.objective.parameters())
    assert all("forward" not in vars(block) for block in small_run.objective.modules() if isinstance(block, ResBlock))


def test_nothing_is_changed(small_run: Run) -> None:
    before = {name: p.clone() for name, p in small_run.objective.named_parameters()}
    plan(small_run.objective, small_run.loop, small_run.kept, 0, 1)
    assert all(torch.equal(p, before[name]) for name, p in small_run.objective.named_parameters())

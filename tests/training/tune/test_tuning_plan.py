"""What is measured before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data.picture_set import read_pictures
from ldm.layers.convolution import ResBlock
from ldm.models.presets import sd1, tiny
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.tune.plan import plan
from ldm.training.tune.run import Run, prepare_run
from ldm.training.tune.settings import Tuning

LOOP = LoopConfig(steps=4, batch=2, rate=1e-2, precision="no")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A LoRA of a tiny model on two pictures."""
    save_checkpoint(random_system(tiny(sd1())), tmp_path / "tiny.safetensors")
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    base = load(tmp_path / "tiny.safetensors", device="cpu", dtype="float32")
    tuning = Tuning(tmp_path / "pictures", tmp_path / "out", adapter=AdapterOptions(rank=2), held_out=0.0)
    return prepare_run(tuning, read_pictures(tuning.pictures, tuning.defaults), base, lambda _: LOOP)


def test_checkpointing_is_part_of_what_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    forward = ResBlock.forward
    monkeypatch.setattr(ResBlock, "forward", lambda *told: (calls.append(True), forward(*told))[1])
    plan(run.objective, run.loop, run.kept, 0, 1)
    plainly = len(calls)
    calls.clear()
    plan(run.objective, run.loop, run.kept, 0, 1, less_memory=True)
    assert 0 < 1.9 * plainly < len(calls) <= 2 * plainly  # once more for each block behind which something is trained
    assert all(p.grad is None for p in run.objective.parameters())
    assert all("forward" not in vars(block) for block in run.objective.modules() if isinstance(block, ResBlock))


def test_nothing_is_changed(run: Run) -> None:
    before = {name: p.clone() for name, p in run.objective.named_parameters()}
    plan(run.objective, run.loop, run.kept, 0, 1)
    assert all(torch.equal(p, before[name]) for name, p in run.objective.named_parameters())

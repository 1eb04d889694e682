"""A run that is small enough to be begun anew by every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from shallow import shallow

from ldm.data.picture_set import read_pictures
from ldm.models.presets import sd1
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.tune import run
from ldm.training.tune.run import Run, prepare_run
from ldm.training.tune.settings import Tuning


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring would take half the time of these tests, for more certainty than they ask for."""
    monkeypatch.setattr(run, "DRAWS", 1)


@pytest.fixture
def small_run(tmp_path: Path) -> Run:
    """A LoRA of a tiny model on three pictures, two steps."""
    save_checkpoint(random_system(shallow(sd1())), tmp_path / "tiny.safetensors")
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue", "green"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    base = load(tmp_path / "tiny.safetensors", device="cpu", dtype="float32")
    tuning = Tuning(tmp_path / "pictures", tmp_path / "out", adapter=AdapterOptions(rank=2), held_out=0.0)
    loop = LoopConfig(steps=2, batch=2, rate=1e-2, warmup=1, ema=0.0, precision="no", save_every=2, evaluate_every=2)
    return prepare_run(tuning, read_pictures(tuning.pictures, tuning.defaults), base, lambda _: loop)

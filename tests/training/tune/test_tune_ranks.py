"""`ldm tune` in two processes writes what it writes in one that accumulates twice as much."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shallow import shallow
from together import run_together
from tune_ranks import METHODS, tune

from ldm.models.presets import sd2
from ldm.pipeline.load import random_system, save_checkpoint

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a model, and what two processes made of them. Its text tower has a last block that nothing reads."""
    folder = tmp_path_factory.mktemp("ranks") / "seen"
    folder.mkdir()
    save_checkpoint(random_system(shallow(sd2())), folder / "tiny.safetensors")
    (folder / "pictures").mkdir()
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (64, 64), name).save(folder / "pictures" / f"{name}.png")
        (folder / "pictures" / f"{name}.txt").write_text(name)
    said = run_together(str(HERE / "tune_ranks.py"), str(folder), folders=[HERE])
    assert said[1] == "", "the second process speaks too"
    return folder


def test_one_of_the_two_writes(folder: Path) -> None:
    first, second = ((folder.parent / f"wrote-{rank}.txt").read_text().split() for rank in range(2))
    for method in METHODS:
        written = {name for name in first if name.startswith(str(folder / f"two-{method}"))}
        assert str(folder / f"two-{method}" / f"two-{method}.safetensors") in written
    assert second == []


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_write_what_one_does(folder: Path, tmp_path: Path, method: str) -> None:
    file = f"two-{method}.safetensors"
    two = load_file(folder / f"two-{method}" / file)
    ones = []
    for accumulate in (2, 1):
        assert tune(folder, method, tmp_path / str(accumulate) / f"two-{method}", accumulate) == 0
        ones.append(load_file(tmp_path / str(accumulate) / f"two-{method}" / file))
    assert two.keys() == ones[0].keys() == ones[1].keys()
    # Adam makes steps of one size out of the smallest gradients, rounding included: a few numbers may differ.
    assert apart(two, ones[0]) < 0.02 * apart(two, ones[1])
    if method == "full":
        base = load_file(folder / "tiny.safetensors")
        assert any(not torch.equal(two[n], base[n]) for n in two if n.startswith("cond_stage_model"))


def test_split_weights_are_written_as_whole_ones(folder: Path) -> None:
    """The saves too, which one process may go on from."""
    split, kept = (
        load_file(folder / "two-split/two-split.safetensors"),
        load_file(folder / "two-full/two-full.safetensors"),
    )
    base = load_file(folder / "tiny.safetensors")
    assert split.keys() == kept.keys()
    assert apart(split, kept) < 0.02 * apart(kept, {name: base[name].half() for name in kept})
    for file in ("weights", "ema", "optimizer"):
        ours, theirs = (
            load_file(folder / f"two-{name}/step-00000002/{file}.safetensors") for name in ("split", "full")
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[name].shape == theirs[name].shape for name in ours)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The distance of all numbers."""
    return math.sqrt(sum(float((one[name].float() - other[name].float()).square().sum()) for name in one))

"""The judge's stage: which pictures teach it, how they are changed, that it learns, and the file that it writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data.packed import write_packed
from ldm.errors import LdmError
from ldm.evaluation.judge import Judge, JudgeConfig
from ldm.models.presets import small, tiny
from ldm.training import recipes
from ldm.training.autoencoder import to_unit
from ldm.training.engine.loop import LoopConfig
from ldm.training.engine.objective import Draw
from ldm.training.judge import (
    JUDGE,
    JUDGE_KEY,
    LEAST,
    SMOOTHING,
    UNKNOWN,
    JudgeObjective,
    accuracy,
    altered,
    labelled,
    labels_of,
    read_judge,
    save_judge,
    train_judge,
)
from ldm.training.stages import HELD_OUT_EVERY, Workspace
from ldm.weights.save import write_tensors

SIZE = 64
TINY = JudgeConfig(("disc", "ring", "bars"), ("disc", "ring", "bars"), 32, (8, 16, 24), 1)
LOOP = LoopConfig(
    steps=60, batch=24, rate=1e-2, warmup=5, schedule="cosine", ema=0.8, precision="no",
    save_every=100, evaluate_every=100,
)  # fmt: skip


def drawing(concept: str, generator: np.random.Generator) -> np.ndarray:
    """A shape of a random colour, size and place on a ground of a random one: only its form says what it is."""
    y, x = np.mgrid[:SIZE, :SIZE] - generator.uniform(24, 40, 2)[:, None, None]
    reach = np.hypot(x, y) / generator.uniform(14, 22)
    inside = {"disc": reach < 1, "ring": (reach < 1) & (reach > 0.6), "bars": (reach < 1) & (x.astype(int) % 8 < 4)}
    ground, shape = generator.integers(0, 100, 3), generator.integers(156, 256, 3)
    return np.where(inside[concept][..., None], shape, ground).astype(np.uint8)


def records(count: int) -> list[dict[str, Any]]:
    """Shapes by turns, every fifth record of two of them."""
    concepts = [TINY.concepts[i % 3] if i % 5 else ["disc", "ring"] for i in range(count)]
    return [{"texts": [f"a {c}"], "kind": "shapes", "key": str(i), "concept": c} for i, c in enumerate(concepts)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder, generator, listed = tmp_path_factory.mktemp("judged"), np.random.default_rng(0), records(240)
    pixels = [drawing(r["concept"] if isinstance(r["concept"], str) else "disc", generator) for r in listed]
    write_packed(iter(list(zip(pixels, listed, strict=True))), folder, SIZE, "pictures")
    return Workspace(folder, folder / "runs", tiny(small(SIZE)))


def test_it_learns_separable_classes_and_is_kept(work, monkeypatch):
    """By the stage itself, from packed pictures to a file; judged on shapes drawn anew, in other sizes too."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "ldm.training.judge.JudgeConfig", lambda concepts, names: JudgeConfig(concepts, names, 32, (8, 16, 24), 1)
        )
        train_judge(work, LOOP)
    judge = read_judge(work.runs / JUDGE)
    assert judge.config.concepts == ("bars", "disc", "ring")
    generator = np.random.default_rng(99)
    answers = [TINY.concepts[i % 3] for i in range(60)]
    fresh = to_unit(np.stack([drawing(concept, generator) for concept in answers]))
    right = [name == answer for name, answer in zip(judge.names_of(fresh), answers, strict=True)]
    assert np.mean(right) > 0.9, "chance is a third"
    smaller = F.interpolate(fresh, (40, 40), mode="area")
    assert np.mean([a == b for a, b in zip(judge.names_of(smaller), answers, strict=True)]) > 0.85


def test_what_is_taught():
    listed: list[dict[str, Any]] = [
        {"texts": [], "kind": "recolor", "concept": "1f34e", "label": "blue red apple"},
        {"texts": [], "kind": "emoji", "concept": "1f34e", "label": "red apple"},
        {"texts": [], "kind": "count", "concept": ["1f34e", "1f34e"], "label": ["red apple", "red apple"]},
        {"texts": [], "kind": "pair", "concept": ["1f34e", "1f34f"], "label": ["red apple", "green apple"]},
        {"texts": [], "kind": "emoji", "concept": "1f9cd", "label": "person standing: dark skin tone"},
        {"texts": [], "kind": "scene", "concept": "1f9cd", "label": "person"},
        {"texts": [], "kind": "parametric", "concept": "clay"},
        {"texts": [], "kind": "parametric"},
    ]
    concepts, names, labels = labelled(listed, 2)
    assert (concepts, names) == (("1f34e", "1f9cd"), ("red apple", "person standing"))
    assert labels.tolist() == [0, 0, 0, UNKNOWN, 1, 1, UNKNOWN, UNKNOWN]
    judge = Judge(JudgeConfig(("1f9cd", "clay"), ("person", "clay"), 16, (8,), 1))
    assert labels_of(judge, listed).tolist() == [*[UNKNOWN] * 4, 0, 0, 1, UNKNOWN]


def test_batches_are_of_pictures_kept_and_of_all_classes_alike():
    numbered = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8) * 6
    labels = np.array([0] * 30 + [1] * 6 + [2] * 4)
    kept = np.setdiff1d(np.arange(40), [3, 33])
    torch.manual_seed(0)
    judge = Judge(replace(TINY, size=16, widths=(8, 16)))
    objective = JudgeObjective(judge, numbered, labels, np.zeros(40, bool), kept, np.array([3, 33]))
    batch = objective.batch(Draw(3000, 0, torch.Generator().manual_seed(0)))
    shares = torch.bincount(batch["labels"]) / 3000
    assert (shares - 1 / 3).abs().max() < 0.04
    plain = objective.batch(Draw(9, 0, torch.Generator().manual_seed(1)))
    again = objective.batch(Draw(9, 0, torch.Generator().manual_seed(1)))
    assert torch.equal(plain["pictures"], again["pictures"])
    drawn: set[int] = set()
    objective.pictures = Watched(numbered, drawn)  # pyright: ignore[reportAttributeAccessIssue]
    objective.batch(Draw(2000, 0, torch.Generator().manual_seed(2)))
    assert drawn == set(kept.tolist())


class Watched:
    """Pictures that note which of them were asked for."""

    def __init__(self, pictures: np.ndarray, asked: set[int]) -> None:
        self.pictures, self.asked = pictures, asked

    def __getitem__(self, index: int) -> np.ndarray:
        self.asked.add(index)
        return self.pictures[index]


def test_the_loss_is_smoothed_cross_entropy():
    torch.manual_seed(0)
    judge = Judge(TINY).eval()
    pictures, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 1, 2])
    objective = JudgeObjective(judge, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int), np.zeros(1, bool),
                               np.arange(1), np.arange(0))  # fmt: skip
    found = objective({"pictures": pictures, "labels": labels})
    logs = judge.probabilities(pictures).double().log()
    wanted = torch.full((4, 3), SMOOTHING / 3, dtype=torch.float64)
    wanted[torch.arange(4), labels] += 1 - SMOOTHING
    assert float(found["loss"].detach()) == pytest.approx(float(-(wanted * logs).sum(dim=1).mean()), rel=1e-5)
    assert float(found["right"]) == float((logs.argmax(dim=1) == labels).float().mean())


def test_pictures_are_changed_and_stay_pictures():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(200, 3, 32, 32)  # dark on the left, bright on the right
    changed = altered(ramp, torch.arange(200) < 100, generator)
    assert changed.shape == ramp.shape and changed.min() >= -1 and changed.max() <= 1
    rising = changed[..., 16:].mean(dim=(1, 2, 3)) > changed[..., :16].mean(dim=(1, 2, 3))
    assert 30 < int(rising[:100].sum()) < 70, "half of those that may be are mirrored"
    assert rising[100:].all()
    grey = altered(torch.zeros(400, 3, 16, 16), torch.zeros(400, dtype=torch.bool), generator)
    assert float(grey.mean(dim=(1, 2, 3)).std()) == pytest.approx(0.4 / math.sqrt(12), rel=0.15), "brightness"
    assert float(grey.flatten(1).std(dim=1).mean()) == pytest.approx(0.05, rel=0.2), "noise"


def test_accuracy_of_a_judge_that_knows():
    torch.manual_seed(0)
    judge = Judge(replace(TINY, concepts=tuple("abcdefgh"), names=tuple("abcdefgh"))).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    best = judge.probabilities(to_unit(pictures)).argsort(dim=1, descending=True).numpy()
    assert accuracy(judge, pictures, best[:, 0], np.arange(12)) == {"top1": 1, "top5": 1}
    assert accuracy(judge, pictures, best[:, 4], np.arange(12)) == {"top1": 0, "top5": 1}
    assert accuracy(judge, pictures, best[:, 7], np.arange(12)) == {"top1": 0, "top5": 0}
    assert accuracy(judge, pictures, best[:, 7], np.arange(0)) == {}


def test_a_file_and_what_is_none(tmp_path: Path):
    torch.manual_seed(0)
    judge = Judge(TINY).eval()
    path = tmp_path / "judge.safetensors"
    save_judge(path, judge)
    pictures = torch.rand(3, 3, 40, 40)
    again = read_judge(path)
    assert again.config == TINY
    torch.testing.assert_close(again.probabilities(pictures), judge.probabilities(pictures), rtol=1e-2, atol=1e-2)
    with pytest.raises(LdmError, match=r"missing\.safetensors"):
        read_judge(tmp_path / "missing.safetensors")
    for state, described, message in (
        (judge.state_dict(), None, "is no judge: its metadata has no ldm.judge"),
        (judge.state_dict(), {"names": ["disc"]}, "1 names for 3 concepts"),
        (judge.state_dict(), {"widths": [8, 12]}, "no multiple of 8"),
        (judge.state_dict(), {"widths": [8, 16]}, "does not hold the judge that its metadata describes"),
        (judge.state_dict(), {"size": 4}, "a size is out of range"),
        ({"stem.weight": torch.zeros(8, 3, 3, 3)}, {}, "does not hold the judge that its metadata describes"),
    ):
        metadata = {} if described is None else {JUDGE_KEY: json.dumps(asdict(TINY) | described)}
        write_tensors(path, state, metadata)
        with pytest.raises(LdmError, match=message):
            read_judge(path)


def test_too_few_pictures(tmp_path: Path):
    listed = records(LEAST)
    write_packed(((np.zeros((SIZE, SIZE, 3), np.uint8), r) for r in listed), tmp_path, SIZE, "pictures")
    with pytest.raises(LdmError, match=f"0 concepts with {LEAST} pictures each, expected two or more"):
        train_judge(Workspace(tmp_path, tmp_path, tiny(small(SIZE))), LOOP)


def test_the_recipes_name_it():
    assert HELD_OUT_EVERY > 1
    for family in ("small", "gpu"):
        recipe = recipes.RECIPES[f"{family}-judge"]
        assert recipe.run is train_judge and recipe.loop is not None

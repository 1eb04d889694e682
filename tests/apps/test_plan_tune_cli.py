"""`ldm plan --tune` by its command: the page, JSON, other ways, and what cannot be planned."""

from __future__ import annotations

import json

import pytest

from ldm.apps import plan_tune
from ldm.apps.cli import main
from ldm.models.presets import sd1, tiny
from ldm.pipeline.plan import Phase
from ldm.training.tune.memory import TuneWork


def quickly(work: TuneWork) -> tuple[Phase, ...]:
    """Stands in for the real count, which takes seconds: 1 GiB for each picture of a step, less by some ways."""
    size = work.loop.batch * 2**30 * work.drawn.width // 128
    return Phase("load", 2**28), Phase("step", size // 2 if work.tuning.checkpointing else size)


@pytest.fixture
def flags(tiny_file, monkeypatch) -> list[str]:
    monkeypatch.setattr(plan_tune, "plan_tuning", quickly)
    return ["plan", "--model", str(tiny_file(tiny(sd1()))), "--device", "cpu", "--size", "128", "--budget", "1GiB"]


def test_tuning_is_planned_as_a_page(flags, capsys):
    assert main([*flags, "--tune", "full", "--batch", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tuning by full, 4 pictures at once of 128x128 on cpu (adamw, precision no)")
    assert [line.split()[0] for line in lines[1:3]] == ["load", "step"] and "<- the most" in lines[2]
    assert lines[3] == "does not fit: 1.00 GiB allowed"
    named = [line.split("  ")[1] for line in lines[5:-1]]
    assert named == ["--checkpointing", "--batch 1 --accumulate 4", "--size 64x64"]  # all else takes as much here
    assert "which fits" in lines[6] and lines[-1].startswith("not counted: Python and its libraries")


def test_tuning_is_planned_as_json(flags, capsys):
    assert main([*flags, "--tune", "lora", "--checkpointing", "--optimizer", "muon", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["tune"], told["batch"], told["optimizer"], told["checkpointing"]) == ("lora", 2, "muon", True)
    assert told["peak"] == told["room"] == 2**30 and told["fits"] is True
    assert [other["flag"] for other in told["others"]] == ["--batch 1 --accumulate 2", "--size 64x64"]


def test_other_ways_of_training_all_of_it(tiny_file, capsys, monkeypatch):
    seen: list[TuneWork] = []
    monkeypatch.setattr(plan_tune, "plan_tuning", lambda work: (seen.append(work), quickly(work))[1])
    flags = ["plan", "--preset", "sd21", "--device", "cuda", "--tune", "dreambooth", "--whole", "--text"]
    assert main([*flags, "--precision", "no"]) == 0
    whole, lora = seen[0], next(work for work in seen if work.tuning.by_adapter)
    assert str(whole.drawn.precision).count("float32") == 3 and not lora.tuning.whole
    assert {work.loop.optimizer for work in seen} >= {"adamw", "adamw8bit", "adafactor"}
    assert any(work.loop.precision == "bf16" for work in seen) and any(not work.tuning.text for work in seen)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["--checkpointing"], "checkpointing: found with a plan for drawing"),
        (["--tune", "lora", "--guidance", "1"], "guidance: found with a plan for tuning"),
        (["--tune", "full", "--rank", "4"], "kind and rank: found with full"),
        (["--tune", "lora", "--batch", "0"], "batch: found 0"),
        (["--tune", "lora", "--accumulate", "0"], "accumulate: found 0"),
        (["--tune", "embedding", "--text"], "text: the text towers are not trained by embedding"),
        (["--tune", "full", "--precision", "fp16"], "fp16, which needs a GPU"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(told, said, flags, capsys):
    assert main([*flags, *told]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1

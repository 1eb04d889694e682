"""The loop: resuming changes nothing, faults lose nothing, the average and the rates are what they say."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from line import CONFIG, Line
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.engine.ema import EMA
from ldm.training.engine.loop import LoopConfig, learning_rate, train
from ldm.training.engine.objective import Draw
from ldm.training.engine.state import load_state


def test_a_run_without_one_finite_step_can_be_resumed(tmp_path: Path) -> None:
    train(Line(poison=(0,)), replace(CONFIG, steps=1, evaluate_every=9), tmp_path)
    line = Line()
    train(line, CONFIG, tmp_path)
    assert len(line.losses) == CONFIG.steps - 1


def test_gains_and_biases_are_spared_where_matrices_decay(tmp_path: Path) -> None:
    class Flat(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": 0 * sum(p.sum() for p in self.parameters())}

    flat = Flat()
    before = {name: p.detach().clone() for name, p in flat.named_parameters()}
    train(flat, replace(CONFIG, rate=0.1, weight_decay=0.5, decayed="matrices"), tmp_path)
    shrunk = [name for name, p in flat.named_parameters() if not torch.equal(p, before[name])]
    assert shrunk == ["layer.weight"]


def test_a_network_of_other_widths_is_refused(tmp_path: Path) -> None:
    class Wide(Line):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

    train(Line(), replace(CONFIG, steps=5, evaluate_every=9), tmp_path)
    with pytest.raises(LdmError, match="a run of another network"):
        train(Wide(), CONFIG, tmp_path)


def test_loss_falls_and_evaluation_sees_the_average(tmp_path: Path) -> None:
    line = Line()
    average = train(line, replace(CONFIG, rate=0.1, steps=60), tmp_path)
    assert sum(line.losses[-5:]) < 0.2 * sum(line.losses[:5])
    assert line.evaluated[-1] == (60, pytest.approx(float(average.weights["layer.weight"])))
    assert line.evaluated[-1][1] != line.layer.weight.item()


def test_a_failed_evaluation_is_told_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Line):
        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            raise RuntimeError("no picture today")

    broken, whole = Broken(), Line()
    average, expected = train(broken, CONFIG, tmp_path / "broken"), train(whole, CONFIG, tmp_path / "whole")
    assert broken.losses == whole.losses
    assert torch.equal(broken.layer.weight, whole.layer.weight)
    assert all(torch.equal(average.weights[n], expected.weights[n]) for n in expected.weights)
    assert "step 10: its evaluation failed" in caplog.text
    assert "no picture today" in caplog.text


@pytest.mark.parametrize("poison", [(), tuple(range(20))])
def test_modules_are_left_as_they_were(tmp_path: Path, poison: tuple[int, ...]) -> None:
    class Dropping(Line):
        def __init__(self) -> None:
            super().__init__(poison)
            self.kept, self.dropped, self.modes = nn.Dropout(), nn.Dropout().eval(), set[tuple[bool, bool]]()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            self.modes.add((self.kept.training, self.dropped.training))
            return super().forward(batch)

    line = Dropping()
    with pytest.raises(LdmError) if poison else nullcontext():
        train(line, CONFIG, tmp_path)
    assert line.modes == {(True, True)}
    assert (line.training, line.kept.training, line.dropped.training) == (True, True, False)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """With fixed data, the mean over micro-batches has the gradient of the whole."""

    class Fixed(Line):
        def batch(self, draw: Draw) -> dict[str, Tensor]:
            return {"x": torch.linspace(-1, 1, draw.count)[:, None]}

    one, three = Fixed(), Fixed()
    train(one, replace(CONFIG, steps=5), tmp_path / "one")
    train(three, replace(CONFIG, steps=5, accumulate=3), tmp_path / "three")
    assert torch.allclose(one.layer.weight, three.layer.weight, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    line = Line(poison=(4,))
    train(line, CONFIG, tmp_path)
    assert all(torch.isfinite(p).all() for p in line.parameters())
    assert line.losses[-1] < line.losses[0]


def test_ten_bad_steps_stop_the_run_and_keep_the_last_save(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="not finite 10 times"):
        train(Line(poison=tuple(range(7, 20))), CONFIG, tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 15
    assert all(torch.isfinite(t).all() for t in state.tensors["weights"].values())


@pytest.mark.parametrize("damage", ["cut", "bent", "no manifest", "null manifest", "no file"])
def test_a_damaged_newest_save_is_passed_over(tmp_path: Path, damage: str) -> None:
    train(Line(), CONFIG, tmp_path)
    newest = tmp_path / "step-00000020"
    weights, manifest = newest / "weights.safetensors", newest / "manifest.json"
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "bent":
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        case "no manifest":
            manifest.unlink()
        case "null manifest":
            manifest.write_text("null")
        case "no file":
            weights.unlink()
    state = load_state(tmp_path)
    assert state is not None and state.step == 15


def test_changed_facts_are_refused_by_name(tmp_path: Path) -> None:
    train(Line(), replace(CONFIG, steps=5), tmp_path)
    with pytest.raises(LdmError, match=r"begun with batch x accumulate x processes = 4, now 8"):
        train(Line(), replace(CONFIG, batch=8), tmp_path)


def test_saves_hold_no_pickles_and_two_are_kept(tmp_path: Path) -> None:
    train(Line(), CONFIG, tmp_path)
    saves = sorted(p.name for p in tmp_path.glob("step-*"))
    assert saves == ["step-00000015", "step-00000020"]
    assert {p.suffix for p in (tmp_path / saves[-1]).iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / saves[-1] / "manifest.json").read_text())["step"] == 20


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_the_step_and_ends_the_run(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    class Interrupted(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.calls == 6:
                signal.raise_signal(number)
            return super().forward(batch)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        train(Interrupted(), CONFIG, tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_during_an_evaluation_loses_no_step(tmp_path: Path) -> None:
    class Interrupted(Line):
        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            signal.raise_signal(signal.SIGTERM)
            return {}

    with pytest.raises(SystemExit):
        train(Interrupted(), replace(CONFIG, evaluate_every=7), tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 7


@pytest.mark.parametrize(("field", "least"), [("accumulate", 1), ("keep", 1), ("workers", 0)])
def test_numbers_that_no_run_can_have(field: str, least: int) -> None:
    with pytest.raises(LdmError, match=f"{field}: found {least - 1}, expected {least} or more"):
        LoopConfig(steps=1, batch=1, rate=1.0, **{field: least - 1})


def test_learning_rates_against_hand_worked_values() -> None:
    constant = LoopConfig(steps=100, batch=1, rate=1.0, warmup=10, cooldown=20)
    assert [learning_rate(constant, s) for s in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    )
    cosine = LoopConfig(steps=100, batch=1, rate=1.0, warmup=1, schedule="cosine")
    assert [learning_rate(cosine, s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-9)


def test_average_is_the_recursion_and_swaps_back() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = EMA(layer, decay=0.5)
    expected = layer.weight.item()
    for step in range(20):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert layer.weight.item() == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert layer.weight.item() == 19.0

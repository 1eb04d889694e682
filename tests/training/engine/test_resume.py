"""A run that was stopped and resumed, or shared out otherwise, is the run that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from line import CONFIG, Line
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.engine.figures import read_figures
from ldm.training.engine.loop import train
from ldm.training.engine.objective import Batch, Draw
from ldm.training.engine.prefetch import ahead
from ldm.training.engine.state import load_state


class Epochs(Line):
    """Ten rows, each once an epoch: twenty steps of three batches of four are two dozen epochs."""

    data = torch.linspace(-1, 1, 10)[:, None]

    def batch(self, draw: Draw) -> Batch:
        places = range(draw.number * draw.count, (draw.number + 1) * draw.count)
        orders = {p // 10: torch.randperm(10, generator=torch.Generator().manual_seed(p // 10)) for p in places}
        rows = torch.stack([self.data[orders[p // 10][p % 10]] for p in places])
        return {"x": rows + 0.1 * torch.randn(rows.shape, generator=draw.generator)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_twenty_steps_are_seven_and_thirteen(tmp_path: Path, accumulate: int, workers: int) -> None:
    config = replace(CONFIG, accumulate=accumulate, workers=workers)
    whole, first, second = Epochs(), Epochs(), Epochs()
    average = train(whole, replace(config, workers=0), tmp_path / "whole")
    train(first, replace(config, steps=7), tmp_path / "parts")
    resumed = train(second, config, tmp_path / "parts")
    assert whole.losses == first.losses + second.losses
    assert len(set(whole.losses)) == len(whole.losses)
    assert torch.equal(whole.layer.weight, second.layer.weight)
    assert all(torch.equal(average.weights[n], resumed.weights[n]) for n in average.weights)


def test_dropout_and_running_means_resume_too(tmp_path: Path) -> None:
    class Deep(Line):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            return {}

    config = replace(CONFIG, evaluate_every=5)
    whole, first, second = (Deep().eval() for _ in range(3))  # as networks from a file are
    train(whole, config, tmp_path / "whole")
    train(first, replace(config, steps=7), tmp_path / "parts")
    torch.rand(3)
    train(second, config, tmp_path / "parts")
    assert whole.losses == first.losses + second.losses
    resumed = second.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items())


def test_a_batch_may_be_split_otherwise_but_not_grow(tmp_path: Path) -> None:
    train(Line(), replace(CONFIG, steps=5), tmp_path)
    train(Line(), replace(CONFIG, steps=7, batch=2, accumulate=2), tmp_path)
    with pytest.raises(LdmError, match="begun with batch x accumulate x processes = 4, now 6; give another --output"):
        train(Line(), replace(CONFIG, batch=2, accumulate=3), tmp_path)


def test_where_rows_meet_a_batch_is_not_split_otherwise(tmp_path: Path) -> None:
    class Meeting(Line):
        def rows_meet(self) -> bool:
            return True

    train(Meeting(), replace(CONFIG, steps=5), tmp_path)
    with pytest.raises(LdmError, match="begun with batch = 4, now 2"):
        train(Meeting(), replace(CONFIG, batch=2, accumulate=2), tmp_path)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"warmup": 9}, "warmup = 3, now 9"), ({"seed": 1}, "seed = 0, now 1"), ({"clip": 2.0}, "clip = 1.0, now 2.0")],
)
def test_another_recipe_is_refused_by_name(tmp_path: Path, field: dict, message: str) -> None:
    train(Line(), replace(CONFIG, steps=5), tmp_path)
    with pytest.raises(LdmError, match=message):
        train(Line(), replace(CONFIG, **field), tmp_path)


def test_other_data_are_refused_by_name(tmp_path: Path) -> None:
    class Told(Line):
        pictures = "one"

        def facts(self) -> dict[str, object]:
            return {"pictures": self.pictures, "sizes": (1, 2)}

    train(Told(), replace(CONFIG, steps=5), tmp_path)
    train(Told(), replace(CONFIG, steps=6), tmp_path)
    other = Told()
    other.pictures = "two"
    with pytest.raises(LdmError, match="begun with pictures = one, now two"):
        train(other, CONFIG, tmp_path)


def test_figures_after_the_step_resumed_from_are_measured_again(tmp_path: Path) -> None:
    class Dies(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.calls == 13:
                raise RuntimeError("the machine is gone")
            return super().forward(batch)

    config = replace(CONFIG, save_every=5, evaluate_every=6, log_every=2)
    with pytest.raises(RuntimeError, match="is gone"):
        train(Dies(), config, tmp_path / "parts")
    assert [f.step for f in read_figures(tmp_path / "parts") if f.of == "evaluation"] == [6, 12]
    with (tmp_path / "parts" / "figures.jsonl").open("a") as file:
        file.write('{"step": 12, "of": "eval')  # as a crash leaves it
    train(Line(), config, tmp_path / "parts")
    train(Line(), config, tmp_path / "whole")
    parts, whole = read_figures(tmp_path / "parts"), read_figures(tmp_path / "whole")
    assert [f.step for f in whole if f.of == "evaluation"] == [6, 12, 18, 20]
    assert [f for f in parts if f.of == "evaluation"] == [f for f in whole if f.of == "evaluation"]
    assert [f.step for f in parts if f.of == "training"] == [f.step for f in whole if f.of == "training"]


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    class Cut(Line):
        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Cut(), CONFIG, tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 10
    line = Line()
    train(line, CONFIG, tmp_path)
    assert [step for step, _ in line.evaluated] == [10, 20]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_working_ahead_keeps_the_order_and_tells_faults_in_their_turn(workers: int) -> None:
    def made(number: int) -> int:
        if number == 17:
            raise ValueError("no such picture")
        return number * number

    got = []
    with pytest.raises(ValueError, match="no such picture"):
        for square in ahead(made, range(100), workers):
            got.append(square)
    assert got == [n * n for n in range(17)]


def test_a_batch_that_cannot_be_made_is_told_at_its_step(tmp_path: Path) -> None:
    class Lacking(Line):
        def batch(self, draw: Draw) -> Batch:
            if draw.number == 12:
                raise LdmError("photo.png: is gone")
            return super().batch(draw)

    with pytest.raises(LdmError, match=r"photo\.png: is gone"):
        train(Lacking(), replace(CONFIG, workers=2), tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 10

"""Every optimizer: it learns, resumes to the bit, heeds separate rates; absent packages and bad requests are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from line import CONFIG, Line
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.engine.ema import EMA
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.loop_config import OptimizerName
from ldm.training.engine.optimizers import optimizer_for, pack, set_rate, take_average
from ldm.training.engine.state import load_state

NAMES = get_args(OptimizerName)
LOOP = replace(CONFIG, batch=16, evaluate_every=8, save_every=8, accumulate=1)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its step, which takes half a minute; what it computes is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Wide(Line):
    """A matrix of 4096 numbers, which 8 bits are for; one all of noughts, as LoRA's; and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.middle(self.first(batch["x"]).tanh()).tanh()
        loss = (self.last(hidden) - 2 * batch["x"] - 1).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        return {"weight": float(self.last.weight.sum())}


def config_of(name: OptimizerName, **more: Any) -> LoopConfig:
    return replace(LOOP, optimizer=name, rate=1.0 if name == "prodigy" else 1e-2, **more)


@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(tmp_path: Path, name: OptimizerName) -> None:
    config = config_of(name, decayed="matrices", accumulate=2)
    whole, first, second = Wide(), Wide(), Wide()
    average = train(whole, config, tmp_path / "whole")
    train(first, replace(config, steps=7), tmp_path / "parts")
    resumed = train(second, config, tmp_path / "parts")
    assert whole.losses == first.losses + second.losses
    weights = dict(second.named_parameters())
    assert all(torch.equal(value, weights[key]) for key, value in whole.named_parameters())
    assert all(torch.equal(average.weights[key], resumed.weights[key]) for key in average.weights)
    ends = [load_state(tmp_path / part) for part in ("whole", "parts")]
    assert ends[0] is not None and ends[1] is not None and ends[0].numbers == ends[1].numbers
    ours, theirs = ends[0].tensors["optimizer"], ends[1].tensors["optimizer"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(tmp_path: Path, name: OptimizerName) -> None:
    wide = Wide()
    train(wide, config_of(name, steps=150, save_every=500, evaluate_every=500), tmp_path)
    assert sum(wide.losses[-10:]) < 0.2 * sum(wide.losses[:10])


def test_eight_bits_are_a_byte_of_each_moment(tmp_path: Path) -> None:
    train(Wide(), config_of("adamw8bit"), tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    codes = [t for name, t in state.tensors["optimizer"].items() if name.endswith(".codes")]
    assert [(t.dtype, t.numel()) for t in codes] == [(torch.uint8, 4096)] * 2


def test_a_step_of_adamw_in_8_bits_is_one_of_adamw(tmp_path: Path) -> None:
    ours, theirs = Wide(), Wide()
    train(ours, config_of("adamw8bit", steps=30), tmp_path / "ours")
    train(theirs, config_of("adamw", steps=30), tmp_path / "theirs")
    assert ours.losses == pytest.approx(theirs.losses, rel=0.1, abs=0.02)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_a_group_whose_rate_is_nought_stays(tmp_path: Path, name: OptimizerName) -> None:
    class Apart(Wide):
        def groups(self) -> list[tuple[list[nn.Parameter], float]]:
            return [(list(self.first.parameters()), 0.0), ([*self.middle.parameters(), *self.last.parameters()], 1.0)]

    apart, before = Apart(), Wide()
    train(apart, config_of(name, steps=5), tmp_path)
    assert torch.equal(apart.first.weight, before.first.weight) and torch.equal(apart.first.bias, before.first.bias)
    assert not torch.equal(apart.middle.weight, before.middle.weight)


def test_other_groups_are_refused_on_resuming(tmp_path: Path) -> None:
    class Apart(Wide):
        def groups(self) -> list[tuple[list[nn.Parameter], float]]:
            return [(list(self.first.parameters()), 0.5), ([*self.middle.parameters(), *self.last.parameters()], 1.0)]

    train(Wide(), config_of("adamw", steps=5), tmp_path)
    with pytest.raises(LdmError, match=r"parameters in groups = \[8\], now \[2, 4\]"):
        train(Apart(), config_of("adamw"), tmp_path)


def test_prodigy_knows_one_rate_only() -> None:
    groups = [([nn.Parameter(torch.ones(2))], 1.0), ([nn.Parameter(torch.ones(2))], 0.5)]
    with pytest.raises(LdmError, match="optimizer prodigy finds one rate for all"):
        optimizer_for(groups, config_of("prodigy"))


def test_prodigy_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer_for([([nn.Parameter(torch.ones(2))], 1.0)], config_of("prodigy"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("more", [{"schedule": "cosine"}, {"cooldown": 5}])
def test_schedule_free_takes_no_schedule(more: dict[str, Any]) -> None:
    with pytest.raises(LdmError, match="schedulefree needs none; leave it constant"):
        optimizer_for([([nn.Parameter(torch.ones(2))], 1.0)], config_of("schedulefree", **more))


def test_the_average_of_schedule_free_is_the_mean_of_its_fast_weights() -> None:
    """Defazio et al. 2024, eq. 3-5: at a constant rate x is the plain mean of z after each step."""
    layer = nn.Linear(3, 1, bias=False)
    optimizer = optimizer_for([(list(layer.parameters()), 1.0)], config_of("schedulefree", weight_decay=0.0))
    average, fast = EMA(layer, 0.9), []
    for step in range(9):
        layer(torch.tensor([1.0, 2.0, step])).square().sum().backward()
        set_rate(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        fast.append(optimizer.state[layer.weight]["z"].clone())
        before = layer.weight.detach().clone()
        take_average(optimizer, layer, average)
        assert torch.equal(layer.weight, before)
        assert torch.allclose(average.weights["weight"], torch.stack(fast).mean(dim=0), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("adamw8bit", "torchao.optim", "torchao"),
        ("adafactor", "transformers.optimization", "transformers"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("schedulefree", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: OptimizerName, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LdmError, match=f"optimizer: {name} needs {package}; run pip install {package}, or choose"):
        optimizer_for([([nn.Parameter(torch.ones(2))], 1.0)], config_of(name))


def test_state_in_another_precision_than_the_weights_keeps_it(tmp_path: Path) -> None:
    """Adafactor's is float32 beside weights in bfloat16."""

    class Half(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.middle.bfloat16()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            hidden = self.middle(self.first(batch["x"]).bfloat16()).float().tanh()
            loss = (self.last(hidden) - 2 * batch["x"] - 1).square().mean()
            self.losses.append(loss.item())
            return {"loss": loss}

    whole, first, second = Half(), Half(), Half()
    train(whole, config_of("adafactor"), tmp_path / "whole")
    train(first, config_of("adafactor", steps=7), tmp_path / "parts")
    train(second, config_of("adafactor"), tmp_path / "parts")
    assert whole.losses == first.losses + second.losses


def test_muons_state_keeps_its_names() -> None:
    wide = Wide()
    optimizer = optimizer_for(wide.groups(), config_of("muon"))
    wide({"x": torch.ones(2, 1)})["loss"].backward()
    optimizer.step()
    tensors, numbers = pack(optimizer)
    assert {name.split(".")[1] for name in tensors} == {"momentum", "step", "first", "second"} and numbers == {}

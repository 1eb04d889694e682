"""What is on disk: whole or not there, the best kept beside the newest, one run in a folder, and clear words."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from line import CONFIG, Line
from torch import Tensor

from ldm.errors import LdmError
from ldm.training.engine.figures import read_figures
from ldm.training.engine.loop import Progress, train
from ldm.training.engine.ranks import join
from ldm.training.engine.state import RunState, load_best, load_state, save_state
from ldm.weights.lock import locked

STATE = RunState(5, {"batch": 4}, {"weights": {"w": torch.arange(6.0), "n": torch.tensor(3)}}, {"k": 0.1})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    state = load_state(tmp_path)
    assert state is not None
    assert (state.step, state.facts, state.numbers) == (5, {"batch": 4}, {"k": 0.1})
    weights = state.tensors["weights"]
    assert torch.equal(weights["w"], torch.arange(6.0)) and weights["n"].shape == () and weights["n"] == 3


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = save_state(tmp_path, STATE)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_save_of_earlier_code_is_loaded(tmp_path: Path) -> None:
    folder = save_state(tmp_path, STATE)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["numbers"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    state = load_state(tmp_path)
    assert state is not None and state.numbers == {}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within, writing beyond so many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_full_disk_leaves_the_last_save_and_nothing_else(tmp_path: Path, size: int) -> None:
    save_state(tmp_path, STATE)
    large = replace(STATE, step=6, tensors={"a": {"w": torch.zeros(100)}, "b": {"w": torch.zeros(10_000)}})
    with largest_file(size), pytest.raises(LdmError, match=r"step-00000006: cannot be saved .*File too large.*resume"):
        save_state(tmp_path, large)
    assert names(tmp_path) == ["step-00000005"]
    state = load_state(tmp_path)
    assert state is not None and state.step == 5


def test_a_run_whose_disk_is_full_ends_with_a_word_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Any) -> Path:
        if self.name == "step-00000010.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(LdmError, match=r"step-00000010: cannot be saved .No space left on device"):
            train(Line(), CONFIG, tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]
    line = Line()
    train(line, CONFIG, tmp_path)
    assert len(line.losses) == 15


def test_leftovers_of_killed_saves_and_later_damaged_ones_go(tmp_path: Path) -> None:
    for name in ("step-00000003.tmp", "step-00000004.tmp.tmp", "step-00000009"):
        (tmp_path / name).mkdir()
    save_state(tmp_path, replace(STATE, step=4), keep=1)
    save_state(tmp_path, STATE, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_a_step_saved_again_is_replaced_only_where_it_differs(tmp_path: Path) -> None:
    folder = save_state(tmp_path, STATE)
    before = folder.stat().st_ino
    assert save_state(tmp_path, STATE).stat().st_ino == before
    (folder / "weights.safetensors").write_bytes(b"damaged")
    save_state(tmp_path, STATE)
    assert load_state(tmp_path) is not None


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json", "optimizer.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_cut_newest_save_costs_one_interval(tmp_path: Path, name: str, part: float) -> None:
    whole, resumed = Line(), Line()
    train(whole, CONFIG, tmp_path / "whole")
    train(Line(), replace(CONFIG, steps=10), tmp_path / "cut")
    path = tmp_path / "cut" / "step-00000010" / name
    os.truncate(path, int(path.stat().st_size * part))
    train(resumed, CONFIG, tmp_path / "cut")
    assert whole.losses[5:] == resumed.losses


class Valley(Line):
    """Its figure falls, and rises again after step 8."""

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        super().evaluate(folder, step)
        return {"depth": abs(step - 8.0) if step != 12 else math.nan, "weight": self.layer.weight.item()}


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    valley, config = Valley(), replace(CONFIG, evaluate_every=4, best="depth")
    train(valley, config, tmp_path)
    best = load_best(tmp_path)
    assert best is not None and best.step == 8 and best.numbers == {"depth": 0.0}
    assert best.tensors["ema"]["layer.weight"].item() == dict(valley.evaluated)[8]
    assert names(tmp_path / "best") == ["step-00000008"]


def test_the_best_so_far_is_remembered_on_resuming(tmp_path: Path) -> None:
    config = replace(CONFIG, evaluate_every=4, best="depth")
    train(Valley(), replace(config, steps=9), tmp_path)
    train(Valley(), config, tmp_path)
    best = load_best(tmp_path)
    assert best is not None and best.step == 8


def test_a_figure_that_there_is_not_is_told_and_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Valley(), replace(CONFIG, best="dept"), tmp_path)
    assert load_best(tmp_path) is None
    assert "best: found no figure 'dept', only depth, weight" in caplog.text


def test_figures_are_means_since_the_last(tmp_path: Path) -> None:
    line = Line()
    train(line, CONFIG, tmp_path)
    found = [f for f in read_figures(tmp_path) if f.of == "training"]
    assert [f.step for f in found] == [5, 10, 15, 20]
    for i, figures in enumerate(found):
        assert figures.values["loss"] == pytest.approx(sum(line.losses[5 * i : 5 * i + 5]) / 5)


def test_steps_left_out_are_counted(tmp_path: Path) -> None:
    line = Line(poison=(6, 7))
    train(line, CONFIG, tmp_path)
    one, two = [f.values for f in read_figures(tmp_path) if f.of == "training"][:2]
    assert "skipped" not in one and two["skipped"] == 2
    assert two["loss"] == pytest.approx(sum(x for x in line.losses[5:10] if math.isfinite(x)) / 3)


def test_progress_is_told_after_every_step(tmp_path: Path) -> None:
    told: list[Progress] = []
    line = Line()
    train(line, CONFIG, tmp_path, told.append)
    assert [p.step for p in told] == list(range(1, 21))
    assert [p.figures["loss"] for p in told] == pytest.approx(line.losses)
    assert told[-1].seconds_left == 0 < told[0].seconds_left and all(p.rows_per_second > 0 for p in told)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    class Nested(Line):
        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            with pytest.raises(LdmError, match=rf"is being written by process {os.getpid()} on .*, since 20\d\d-"):
                train(Line(), CONFIG, folder)
            return {"refused": 1.0}

    train(Nested(), CONFIG, tmp_path)
    assert [f.values for f in read_figures(tmp_path) if f.of == "evaluation"] == [{"refused": 1.0}] * 2
    train(Line(), replace(CONFIG, steps=21), tmp_path)  # the lock that stays behind is nobody's


def test_the_lock_of_a_killed_process_is_nobodys(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ldm.weights.lock import locked\n"
        "with locked(Path(sys.argv[1]), '--output'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(LdmError, match=f"written by process {holder.pid} on"), locked(tmp_path, "--output"):
            pass
        holder.kill()
    with locked(tmp_path, "--output"):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "closed" / "lock").mkdir(parents=True)
    for output, why in ((tmp_path / "file" / "run", "not a directory"), (tmp_path / "closed", "is a directory")):
        line = Line()
        with pytest.raises(LdmError, match=rf"cannot be written \({why}\); .*--output"):
            train(line, CONFIG, output)
        assert not line.losses


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_is_told_with_advice(tmp_path: Path, error: Exception) -> None:
    class Greedy(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.calls == 8:
                raise error
            return super().forward(batch)

    with pytest.raises(LdmError, match="step 8: out of memory with a batch of 4; give a smaller batch and accumulate"):
        train(Greedy(), CONFIG, tmp_path)
    line = Line()
    train(line, replace(CONFIG, batch=2, accumulate=2), tmp_path)
    assert line.calls == 2 * 15


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    class Wrong(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(Wrong(), CONFIG, tmp_path)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Broken(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            found = super().forward(batch)
            if self.calls == 9:
                with torch.no_grad():
                    self.layer.bias.fill_(math.inf)
            return found

    with pytest.raises(LdmError, match="step 10: the weights are not finite, and were not saved"):
        train(Broken(), CONFIG, tmp_path)
    state = load_state(tmp_path)
    assert state is not None and state.step == 5


def test_half_precision_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="precision: found fp16, which needs a GPU"):
        train(Line(), replace(CONFIG, precision="fp16"), tmp_path)


def test_the_scaler_of_half_precision_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one that grows every third step, on the CPU, where no run has one. Steps are those without it."""

    class Scaling(Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)  # type: ignore[assignment]

    plain, whole, first, second = Line(), Line(), Line(), Line()
    train(plain, CONFIG, tmp_path / "plain")
    monkeypatch.setattr("ldm.training.engine.loop.Accelerator", Scaling)
    train(whole, CONFIG, tmp_path / "whole")
    train(first, replace(CONFIG, steps=7), tmp_path / "parts")
    train(second, CONFIG, tmp_path / "parts")
    assert whole.losses == first.losses + second.losses
    assert whole.losses == plain.losses  # scaled by a power of 2, and clipped as without
    gradients = [[line.values["gradient"] for line in read_figures(tmp_path / part) if line.of == "training"]
                 for part in ("plain", "whole")]  # fmt: skip
    assert gradients[0] == gradients[1] != []
    ends = [load_state(tmp_path / part) for part in ("whole", "parts")]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].numbers["scaler"] == ends[1].numbers["scaler"]
    assert ends[0].numbers["scaler"]["scale"] == 4.0 * 2**6 and ends[0].numbers["scaler"]["_growth_tracker"] == 2


@pytest.mark.parametrize(("flag", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_sharded_weights_are_refused(flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flag, "true")
    with pytest.raises(LdmError, match=f"accelerate: found {name}, expected whole weights in every process"):
        train(Line(), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cpu_that_is_asked_for_is_taken_where_there_is_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState._reset_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert join(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(LdmError, match="device: found cuda, but this process has begun on cpu; start it anew"):
        join(torch.device("cuda"))
    assert join() == torch.device("cpu")  # as it has begun


@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    class Told(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if moment == "step" and self.calls == 9:
                signal.raise_signal(number)
            return super().forward(batch)

        def evaluate(self, folder: Path, step: int) -> dict[str, float]:
            if moment == "evaluation" and step == 10:
                signal.raise_signal(number)
            return super().evaluate(folder, step)

    def rename(self: Path, target: Any) -> Path:
        if moment == "save" and self.name == "step-00000010.tmp":
            signal.raise_signal(number)
        return renamed(self, target)

    renamed = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    first, second, whole = Told(), Line(), Line()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        train(first, CONFIG, tmp_path / "parts")
    assert number == signal.SIGINT or stopped.value.code == 143  # type: ignore[attr-defined]
    moment = "no more"
    train(second, CONFIG, tmp_path / "parts")
    train(whole, CONFIG, tmp_path / "whole")
    assert len(first.losses) == 10 and first.losses + second.losses == whole.losses


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    class Impatient(Line):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            if self.calls == 7:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                time.sleep(60)
            return super().forward(batch)

    line, begun = Impatient(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(line, CONFIG, tmp_path)
    assert line.calls == 7 and time.monotonic() - begun < 50
    state = load_state(tmp_path)
    assert state is not None and state.step == 5

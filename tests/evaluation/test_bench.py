"""The harness of `ldm bench`: a fake clock for its figures, and diffusers itself for the equality of both sides."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation import bench_diffusers, bench_ours
from ldm.evaluation.bench import Entry, Plan, Subject, bench, play
from ldm.evaluation.bench_inputs import PLAIN, Setting, Work
from ldm.evaluation.bench_process import Fresh, peak_bytes
from ldm.evaluation.turns import Measured, error, in_turns, median_seconds, paired_ratio, psnr, timed
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.weights.diffusers_write import write_folder
from ldm.weights.source import open_source

TINY = {"sd15": tiny(sd1()), "sd21": tiny(sd2("v")), "sdxl": tiny(sdxl())}


def entries(plan: Plan) -> dict[str, Entry]:
    return {entry.part: entry for entry in bench(plan)}


class Clock:
    """Time that passes as it is told: the seconds that each run is to take."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.now, self.running = seconds, 0.0, False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.seconds)
        self.running = not self.running
        return self.now


def test_rounds_go_to_and_fro_after_one_to_warm_up():
    order: list[str] = []

    def contestant(name: str) -> Callable[[], Measured]:
        return lambda: (order.append(name), Measured(len(order)))[1]

    measured = in_turns({"a": contestant("a"), "b": contestant("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [run.seconds for run in measured["a"]] == [4, 5, 8]
    assert [run.seconds for run in measured["b"]] == [3, 6, 7]


def test_a_clock_is_read_around_each_run_and_gradients_are_off():
    gradients: list[bool] = []

    def run() -> Tensor:
        gradients.append(torch.is_grad_enabled())
        return torch.ones(2, dtype=torch.bfloat16)

    measured = timed(run, Clock(iter([0.25])))()
    assert measured.seconds == 0.25 and measured.output is not None
    assert measured.output.dtype == torch.float32 and gradients == [False]


def test_medians_and_ratios_of_a_fake_clock():
    ours = [Measured(s) for s in (1.0, 9.0, 2.0)]
    theirs = [Measured(s) for s in (3.0, 9.0, 4.0)]
    assert median_seconds(ours) == 2.0 and median_seconds(theirs) == 4.0
    assert paired_ratio(ours, theirs) == 2.0  # of 3, 1 and 2: the slow round counts for both


def test_errors_by_hand():
    far = error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert far.max == 0.5 and far.l2 == pytest.approx(0.1)
    assert psnr(torch.full((3, 4), 0.1), torch.zeros(3, 4)) == pytest.approx(20 * math.log10(2 / 0.1))
    assert psnr(torch.ones(2), torch.ones(2) * 3) == math.inf
    with pytest.raises(ValueError, match=r"cannot compare \(2,\) with \(3,\)"):
        error(torch.ones(2), torch.ones(3))


def test_their_fastest_setting_is_found_and_no_two_are_held():
    costs = {Setting("float32"): 3.0, Setting("bfloat16"): 1.5, Setting("bfloat16", True): 1.25}
    held: list[Setting] = []
    most = 0

    class Theirs:
        def __init__(self, setting: Setting) -> None:
            nonlocal most
            held.append(setting)
            most = max(most, len(held))
            self.setting = setting

        def __call__(self) -> Measured:
            return Measured(costs[self.setting])

        def __del__(self) -> None:
            held.remove(self.setting)

    played = play(lambda: Measured(0.5), Theirs, tuple(costs), 5)
    assert (played.best, played.default) == (Setting("bfloat16", True), Setting("float32"))
    assert median_seconds(played.theirs_best) == 1.25 and median_seconds(played.theirs_default) == 3.0
    assert (played.paired_ratio, played.paired_ratio_default, len(played.ours), most) == (2.5, 6.0, 5, 1)


def test_their_default_may_be_their_best():
    played = play(lambda: Measured(0.5), lambda _: lambda: Measured(1.0), (Setting("float32"),), 3)
    assert played.best == played.default == Setting("float32")
    assert played.theirs_best is played.theirs_default and played.paired_ratio_default == played.paired_ratio == 2


@pytest.mark.parametrize("preset", TINY)
def test_both_sides_hold_the_same_weights_and_are_given_the_same(preset, tiny_file, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_diffusers, "settings", lambda _: (Setting("float32"),))
    plan = Plan(tiny_file(TINY[preset]), ("step", "decode", "text", "picture"), (128,), runs=1, steps=2)
    for entry in entries(plan).values():
        assert entry.agreement is not None
        assert entry.agreement < 1e-4 if entry.part != "picture" else entry.agreement < 5e-3  # of 8 bits
        assert entry.theirs_best is not None and entry.theirs_default is not None
        assert entry.ratio == entry.theirs_best / entry.ours
        assert entry.ratio_default == entry.theirs_default / entry.ours
        assert entry.max_error is not None and entry.theirs_max_error is not None
        assert (entry.psnr_db is not None) == (entry.part in ("decode", "picture"))


def test_figures_are_medians_of_the_clock(tiny_file, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("ldm.pipeline.device.multiplies_bfloat16", lambda _: True)
    clock = Clock(float(number) for number in range(1, 1000))
    plan = Plan(tiny_file(TINY["sd15"]), ("text",), (64,), runs=3)
    (entry,) = bench(plan, clock=clock)
    # Both references take 1 s and 2 s, the trials of float32 and bfloat16 3 to 6; then ours and theirs take turns.
    # Their float32 was the faster one, so it is their best and their default: 7, 8 | 10, 9 | 11, 12 | 14, 13.
    assert (entry.ours, entry.theirs_best, entry.theirs_default) == (11, 12, 12)
    assert entry.ratio == 12 / 11 and entry.paired_ratio == 13 / 14 and entry.runs == 3


def test_an_error_is_against_the_same_sides_float32(tiny_file, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_diffusers, "settings", lambda _: (Setting("bfloat16"),))
    (entry,) = bench(Plan(tiny_file(TINY["sd15"]), ("step",), (64,), runs=1))
    assert entry.theirs_l2_error is not None and 1e-3 < entry.theirs_l2_error < 0.2
    assert entry.settings is not None and entry.settings["theirs_default"] == "bfloat16"


def test_without_diffusers_ours_is_measured_alone_and_it_is_said(tiny_file, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "installed", lambda: None)
    for entry in entries(Plan(tiny_file(TINY["sd15"]), ("step", "decode"), (64,), runs=1)).values():
        assert entry.ours > 0 and entry.l2_error is not None
        assert entry.theirs_best is entry.ratio is entry.agreement is None
        assert entry.note == "diffusers, or transformers, is not installed"


def uneven(config: SystemConfig) -> SystemConfig:
    """With towers of two widths, for by these `from_single_file` tells SDXL's two apart."""
    first, second = config.text
    width = 2 * first.tower.width
    second = replace(second, tower=replace(second.tower, width=width, projection=width))
    unet = replace(config.unet, context_width=first.tower.width + width, vector_width=width + 6 * 256)
    return replace(config, unet=unet, text=(first, second))


@pytest.mark.parametrize("task", ["step", "picture"])
@pytest.mark.parametrize("config", [TINY["sd15"], uneven(TINY["sdxl"])], ids=["sd15", "sdxl"])
def test_a_single_file_is_loaded_and_run_as_a_script_would(config, task, tiny_file, tmp_path):
    pytest.importorskip("diffusers")
    source = open_source(tiny_file(config))
    write_folder(tmp_path / "folder", source, config)
    work = bench_ours.work_for(config, 64, 1, "cpu")
    for side in (bench_ours, bench_diffusers):
        setting, answer = Setting("bfloat16", frugal=True), tmp_path / side.__name__
        side.run_fresh(Fresh(task, tiny_file(config), tmp_path / "folder", work, setting, answer, time.monotonic(), 1))
        told = json.loads(answer.read_text())
        assert told["seconds"] > 0 and told["peak"] > 2**26


def test_peak_memory_of_processes_of_their_own(tiny_file, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "installed", lambda: None)
    (entry,) = bench(Plan(tiny_file(TINY["sd15"]), ("memory",), (64,), steps=1))
    assert entry.unit == "bytes" and 5e7 < entry.ours < 4e9  # torch alone takes as much as the former
    assert entry.ratio is None


def test_load_and_memory_are_told_from_what_the_processes_measured(tiny_file, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "installed", lambda: "0")
    monkeypatch.setattr(bench_diffusers, "settings", lambda _: (Setting("float32"), Setting("bfloat16")))

    def fresh(side: str, task: str, file: Path, folder: Path, work: Work, setting: Setting = PLAIN) -> Measured:
        cost = 1 if side == "bench_ours" else {"float32": 8, "bfloat16": 4}[setting.dtype]
        return Measured(cost, peak=cost * 100 // (2 if setting.frugal else 1))

    monkeypatch.setattr("ldm.evaluation.bench.measure_fresh", fresh)
    found = entries(Plan(tiny_file(TINY["sd15"]), ("load", "memory"), (64,), runs=2))
    load, memory = found["load"], found["memory"]
    assert (load.ours, load.theirs_best, load.theirs_default, load.ratio, load.ratio_default) == (1, 4, 8, 4, 8)
    assert (memory.ours, memory.theirs_best, memory.theirs_default, memory.ratio) == (100, 200, 800, 2)
    assert memory.settings is not None and memory.settings["theirs_best"] == "bfloat16, sliced and tiled"


def test_where_their_process_fails_ours_is_told_alone(tiny_file, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "installed", lambda: "0")

    def fresh(side: str, *_: object) -> Measured:
        if side == "bench_diffusers":
            raise LdmError("they failed")
        return Measured(1.5, peak=100)

    monkeypatch.setattr("ldm.evaluation.bench.measure_fresh", fresh)
    found = entries(Plan(tiny_file(TINY["sd15"]), ("load", "memory"), (64,), runs=2))
    assert [entry.note for entry in found.values()] == ["they failed"] * 2
    assert (found["load"].ours, found["memory"].ours, found["load"].ratio) == (1.5, 100, None)


def test_what_a_process_is_told_survives_the_command_line(tmp_path):
    work = Work(64, 2, (4, 8, 8), 32, 0, "ddim")
    asked = Fresh("step", tmp_path / "a b", tmp_path, work, Setting("bfloat16", True), tmp_path / "x.json", 1.5, 2)
    assert Fresh.from_json(asked.as_json()) == asked
    asked.tell(2.5)
    told = json.loads(asked.answer.read_text())
    assert told["seconds"] == 2.5 and abs(told["peak"] - (peak_bytes("cpu") or 0)) < 2**26


def test_a_process_that_fails_is_an_error_of_one_line(tiny_file, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "installed", lambda: None)
    monkeypatch.setattr(bench_ours, "work_for", lambda *_: Work(64, 1, (3, 8, 8), 32, 0, "ddim"))
    with pytest.raises(LdmError, match=r"^step in a process of its own \(bench_ours\): failed: .*channels") as failed:
        list(bench(Plan(tiny_file(TINY["sd15"]), ("load",), (64,), runs=1)))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (tiny(sd1(in_channels=9)), 64, "needs more than a text"),
        (tiny(sdxl_refiner()), 64, "needs more than a text"),
        (tiny(sd1()), 100, "size: found 100, expected a multiple of 8"),
        (tiny(sd1()), 4096, "size: found 4096"),
    ],
)
def test_what_cannot_be_measured(config: SystemConfig, size: int, message: str):
    with pytest.raises(LdmError, match=message):
        bench_ours.work_for(config, size, 4, "cpu")


@pytest.mark.parametrize(("runs", "steps"), [(0, 4), (5, 0), (5, 1001)])
def test_a_plan_that_cannot_be(runs: int, steps: int):
    with pytest.raises(LdmError, match=r"expected at least one run"):
        next(bench(Plan(Path("x"), runs=runs, steps=steps)))


def test_tuning_takes_the_steps_that_diffusers_and_peft_take(tiny_file, monkeypatch):
    pytest.importorskip("diffusers")
    from ldm.training.tune.bench import bench_tuning

    monkeypatch.setattr("ldm.training.engine.precision.multiplies_bfloat16", lambda _: False)
    for preset in ("sd15", "sd21"):
        (entry,) = bench(Plan(tiny_file(TINY[preset]), ("tune",), (64,), runs=2), tuning=bench_tuning)
        assert entry.agreement is not None and entry.agreement < 1e-5  # of the first loss, eps and v
        assert entry.ours > 0 and entry.theirs_best is not None and entry.theirs_default is not None
        assert entry.ratio == entry.theirs_best / entry.ours and entry.runs == 2
        assert entry.settings is not None and entry.settings["ours"] == "LoRA of rank 16, batch 2, float32"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_tuning_on_a_gpu_loads_the_base_in_the_dtype_of_the_run(native, dtype, monkeypatch):
    from ldm.training.tune.bench import bench_tuning

    asked = []

    def load(file: Path, **told: object) -> None:
        asked.append((file, told))
        raise LdmError("this far")

    monkeypatch.setattr("ldm.training.engine.precision.multiplies_bfloat16", lambda _: native)
    monkeypatch.setattr("ldm.training.tune.bench.load", load)
    with pytest.raises(LdmError, match="this far"):
        bench_tuning(Subject(Path("x"), None, TINY["sd15"], "cuda"), 64, 1)
    assert asked == [(Path("x"), {"device": torch.device("cuda"), "dtype": dtype, "offload": "none"})]


def test_tuning_is_measured_alone_without_diffusers(tiny_file, monkeypatch):
    from ldm.training.tune.bench import bench_tuning

    monkeypatch.setattr(bench_diffusers, "installed", lambda: None)
    (entry,) = bench(Plan(tiny_file(TINY["sd15"]), ("tune",), (64,), runs=1), tuning=bench_tuning)
    assert entry.ours > 0 and entry.theirs_best is None and entry.note is not None and "not installed" in entry.note
    with pytest.raises(LdmError, match="told a text alone"):
        list(bench(Plan(tiny_file(TINY["sdxl"]), ("tune",), (64,), runs=1), tuning=bench_tuning))


def test_bfloat16_is_not_tried_where_it_would_take_hours(monkeypatch):
    for native, expected in ((False, {"float32"}), (True, {"float32", "bfloat16"})):
        monkeypatch.setattr("ldm.pipeline.device.multiplies_bfloat16", lambda _, native=native: native)
        assert {setting.dtype for setting in bench_diffusers.settings("cpu")} == expected


def test_compiled_steps_are_measured_as_such(tiny_file, monkeypatch):
    made = []
    real = LatentDiffusion.compiled
    monkeypatch.setattr(LatentDiffusion, "compiled", lambda self: made.append(self.dtype) or real(self, "eager"))
    plan = Plan(tiny_file(TINY["sd15"]), ("step", "decode"), (64,), runs=1, alone=True, compile=True)
    step, decode = bench(plan)
    assert len(made) == 1 and step.settings is not None and decode.settings is not None
    assert (step.settings["ours"] or "").endswith(", compiled") and "compiled" not in (decode.settings["ours"] or "")
    assert step.note is not None and "step 64: ours is compiled, which took" in step.note
    assert "diffusers was left out" in step.note
    with pytest.raises(LdmError, match="compile: acts on step and picture; ask for one"):
        next(bench(replace(plan, parts=("decode",))))
    assert step.l2_error is not None and step.l2_error < 1e-5

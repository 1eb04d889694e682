"""What is planned against what a fresh process is seen to hold at its peak, and against counted weights."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import SystemConfig, sd2, sdxl, tiny
from ldm.models.text_encoder import TextConfig
from ldm.pipeline.device import available_memory, choose_precision, multiplies_bfloat16
from ldm.pipeline.load import random_system, save_checkpoint
from ldm.pipeline.plan import LOADING, Work, peak, plan_drawing, tensors_of
from ldm.weights.io import WINDOW, read_header
from ldm.weights.layout import build

CPU = torch.device("cpu")

DRAW = """
import sys
from ldm.pipeline.load import load
import ldm.tasks.txt2img

def told(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = told("VmRSS:")
model = load(sys.argv[1], device="cpu", dtype=sys.argv[2])
model.generate("a red apple", steps=1, width=256, height=256, seed=0)
print(told("VmHWM:") - before)
"""


def medium() -> SystemConfig:
    """SD 2.1's layout with fewer channels: 90 M parameters."""
    config = sd2()
    tower = TextConfig(256, 2, 4, projection=256, names="open_clip", activation="gelu")
    return replace(
        config,
        unet=replace(config.unet, model_channels=96, head_width=32, context_width=256),
        autoencoder=replace(config.autoencoder, base_channels=64),
        text=(replace(config.text[0], tower=tower),),
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "medium.safetensors"
    save_checkpoint(random_system(medium()), path, dtype=torch.float16)
    return path


def work(config: SystemConfig, dtype: str, tensors=None, **changes) -> Work:
    precision = choose_precision(dtype, CPU, config.family)
    size = config.size
    return replace(Work(config, tensors or tensors_of(config), CPU, precision, size, size), **changes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if multiplies_bfloat16(CPU) else ["float32"])
def test_a_fresh_process_grows_by_what_was_planned(file, dtype):
    planned = peak(plan_drawing(work(medium(), dtype, read_header(file).tensors, width=256, height=256)))
    command = [sys.executable, "-c", DRAW, str(file), dtype]
    # The same run grows by a tenth more or less from one time to the next, as the C library's allocator has it.
    ran = [subprocess.run(command, capture_output=True, text=True, check=True, timeout=600) for _ in range(3)]
    growth = statistics.median(int(one.stdout) for one in ran)
    assert growth > 150e6
    assert planned == pytest.approx(growth, rel=0.15)


def test_loading_holds_every_weight_once_and_a_window_of_the_file():
    config = tiny(sd2())
    networks = build(config).by_prefix().values()
    numbers = sum(p.numel() for network in networks for p in network.parameters())
    whole = plan_drawing(work(config, "float32"))[0].peak - LOADING
    assert 4 * numbers < whole <= 4 * numbers + min(WINDOW, 2 * numbers)
    mapped = plan_drawing(work(config, "float32", tensors_of(config, "F32")))[0].peak - LOADING
    assert mapped == pytest.approx(4 * numbers, rel=1e-3)  # nothing is copied


def test_adapters_leave_what_they_change_as_it_was():
    config = tiny(sd2())
    model = random_system(config)
    changing = [p for network in (model.unet, *model.text) for p in network.parameters() if p.dim() > 1]
    plain, adapted = (plan_drawing(work(config, "float32", adapted=given)) for given in (False, True))
    for one, other in zip(plain[1:], adapted[1:], strict=True):  # loading holds a window of the file besides
        assert other.peak - one.peak == sum(p.nbytes for p in changing)
    on_gpu = replace(work(config, "float32"), device=torch.device("cuda"), adapted=True)
    waiting = replace(on_gpu, offload="parts")
    assert plan_drawing(waiting) == plan_drawing(replace(waiting, adapted=False))
    assert peak(plan_drawing(on_gpu)) - peak(plan_drawing(replace(on_gpu, adapted=False))) == sum(
        p.nbytes for p in changing
    )


def test_controlnets_stay_beside_the_model_unless_they_wait_elsewhere():
    config = tiny(sd2())
    with torch.device("meta"):
        weights = sum(p.nbytes for p in ControlNet(ControlNetConfig(config.unet)).parameters())
    on_gpu = replace(work(config, "float32"), device=torch.device("cuda"))
    for given in (work(config, "float32"), on_gpu):
        plain, one, two = (plan_drawing(replace(given, controls=count)) for count in (0, 1, 2))
        for which in (0, 1, 3):  # load, text, decode
            assert one[which].peak - plain[which].peak == weights
            assert two[which].peak - plain[which].peak == 2 * weights
        # 13 residuals of the last to look and the sum over both are there when the U-Net begins
        assert weights < one[2].peak - plain[2].peak < two[2].peak - plain[2].peak
    plain, waiting = (plan_drawing(replace(on_gpu, offload="parts", controls=count)) for count in (0, 1))
    assert [a == b for a, b in zip(plain, waiting, strict=True)] == [True, True, False, True]
    assert waiting[2].peak - plain[2].peak > weights


def test_phases_grow_with_what_they_do():
    config = tiny(sdxl())
    plain = {phase.name: phase.peak for phase in plan_drawing(work(config, "float32", width=256, height=256))}
    larger = {
        phase.name: phase.peak
        for phase in plan_drawing(work(config, "float32", width=512, height=256, batch=2, from_picture=True))
    }
    assert list(plain) == ["load", "text", "denoise", "decode"]
    assert list(larger) == ["load", "text", "encode", "denoise", "decode"]
    assert larger["load"] == plain["load"] and larger["text"] == plain["text"]
    alone = {
        phase.name: phase.peak for phase in plan_drawing(work(config, "float32", width=256, height=256, guided=False))
    }
    assert alone["denoise"] < plain["denoise"] < larger["denoise"]
    assert larger["decode"] > plain["decode"]
    assert alone["decode"] == pytest.approx(plain["decode"], rel=1e-3)  # of one picture at a time


def test_this_machine_tells_what_is_free():
    free = available_memory(CPU)
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize(("share", "expected"), [(1.0, 500 + 300 - 200), (0.5, 1000 // 2 - 200)])
def test_what_torch_keeps_of_a_gpu_is_free_to_it_up_to_its_share(monkeypatch, share: float, expected: int):
    told = {"mem_get_info": (500, 1000), "memory_reserved": 300, "memory_allocated": 200}
    told |= {"get_per_process_memory_fraction": share}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_memory(torch.device("cuda:0")) == expected

"""What tuning is planned to hold against what autograd and fresh processes are seen to hold, and counted bytes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.models.presets import SystemConfig, sd1, sd2, tiny
from ldm.models.text_encoder import TextConfig
from ldm.pipeline.device import choose_precision
from ldm.pipeline.live_memory import live_memory
from ldm.pipeline.load import random_system, save_checkpoint
from ldm.pipeline.plan import Work, peak, plan_drawing, tensors_of
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.optimizers import optimizer_for
from ldm.training.tune.memory import TuneWork, make_tables, plan_tuning
from ldm.training.tune.settings import Tuning
from ldm.types import Conditioning
from ldm.weights.io import read_header
from ldm.weights.layout import build

CPU = torch.device("cpu")


def small() -> SystemConfig:
    """A tiny SD 1.x with one residual block at each level, since every kernel's shapes take a while."""
    config = tiny(sd1())
    return replace(config, unet=replace(config.unet, res_blocks=1))


def medium() -> SystemConfig:
    """SD 2.1's layout with fewer channels: 45 M parameters."""
    config = sd2()
    tower = TextConfig(256, 2, 4, projection=256, names="open_clip", activation="gelu")
    return replace(
        config,
        unet=replace(config.unet, model_channels=64, head_width=32, context_width=256),
        autoencoder=replace(config.autoencoder, base_channels=64),
        text=(replace(config.text[0], tower=tower),),
    )


def work(config: SystemConfig, size: int = 64, batch: int = 1, accumulate: int = 1, **told: Any) -> TuneWork:
    precision = choose_precision("float32", CPU, config.family)
    tuning = Tuning(Path(), Path(), adapter=AdapterOptions(rank=4), **told)
    loop = LoopConfig(steps=1, batch=batch, rate=1e-4, precision="no", accumulate=accumulate)
    return TuneWork(Work(config, tensors_of(config), CPU, precision, size, size), tuning, loop)


def planned(config: SystemConfig, *args: Any, **told: Any) -> dict[str, int]:
    return {phase.name: phase.peak for phase in plan_tuning(work(config, *args, **told))}


def unet_bytes(config: SystemConfig) -> int:
    return sum(4 * p.numel() for p in build(config).unet.parameters())


def test_a_lora_takes_what_drawing_does_and_itself():
    told = planned(small())
    assert list(told) == ["load", "encode", "step", "look", "save"]
    drawn = {phase.name: phase.peak for phase in plan_drawing(work(small()).drawn)}
    assert told["load"] == drawn["load"]
    assert 0 < told["look"] - max(drawn["denoise"], drawn["decode"]) < 2e6  # a rank of 4 of a tiny model


def test_all_of_a_unet_is_there_as_weights_as_average_and_as_two_moments():
    lora, full = planned(small()), planned(small(), method="full")
    assert full["save"] - lora["save"] == pytest.approx(3 * unet_bytes(small()), rel=0.05)
    assert full["encode"] <= lora["encode"]  # no second one beside the base's own
    kept = planned(small(), method="full", accumulate=2)
    assert 0 < kept["step"] - full["step"] <= unet_bytes(small())  # gradients beside activations


def test_checkpointing_keeps_what_blocks_are_given():
    plain, saving = (planned(small(), 256, 2, checkpointing=given)["step"] for given in (False, True))
    assert saving < 0.85 * plain


@pytest.mark.parametrize(
    ("method", "text"), [("lora", True), ("full", True), ("embedding", False), ("controlnet", False)]
)
def test_every_method_can_be_planned(method, text):
    told = planned(small(), method=method, text=text)
    assert told["load"] < max(told.values()) == max(told["step"], told["look"]) < 350e6


@pytest.mark.parametrize(
    ("name", "each"),
    [("adamw", 8), ("schedulefree", 8), ("prodigy", 16), ("muon", 4), ("adamw8bit", 2), ("adafactor", 0)],
)
def test_an_optimizer_keeps_its_own_bytes_for_each_number(name, each):
    loop = LoopConfig(steps=1, batch=1, rate=1e-4, optimizer=name)
    make_tables(loop)
    with live_memory(CPU) as memory, torch.compiler.set_stance("force_eager"):
        weight = torch.nn.Parameter(torch.empty(512, 512))
        before = memory.live
        optimizer = optimizer_for([([weight], 1.0)], loop)
        weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        assert (memory.live - before) / weight.numel() == pytest.approx(each, abs=0.1)


def test_what_the_way_back_needs_is_what_autograd_keeps():
    """The same U-Net with numbers: every storage that PyTorch keeps for the gradients, once."""
    config = tiny(sd2())
    unet = random_system(config).unet.requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    def asked(network: Any) -> torch.Tensor:
        cross = torch.empty(2, 77, network.config.context_width)
        return network(torch.empty(2, 4, 16, 16), torch.zeros(2), Conditioning(cross=cross))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = asked(unet)
    truly = sum(storage.nbytes() for storage in kept.values())
    assert out.requires_grad
    with live_memory(CPU) as memory:
        copy = build(config).unet.requires_grad_(True)
        before = memory.live
        out = asked(copy)
        assert memory.live - before == pytest.approx(truly, rel=0.02)


TUNE = """
import sys
from pathlib import Path
import ldm.apps.tune, ldm.training.adapters
from ldm.data.buckets import usual_buckets
from ldm.data.picture_set import read_pictures
from ldm.pipeline.load import load
from ldm.training.engine.loop import train
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.tune.run import prepare_run
from ldm.training.tune.settings import Tuning

def told(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

file, folder, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
before = told("VmRSS:")
base = load(file, device="cpu", dtype="float32")
tuning = Tuning(folder, folder / "out", method=method, held_out=0.0, buckets=usual_buckets(64))
loop = LoopConfig(steps=2, batch=1, rate=1e-4, warmup=1, precision="no", save_every=9, evaluate_every=9, workers=1)
run = prepare_run(tuning, read_pictures(folder, tuning.defaults), base, lambda count: loop)
run.objective.evaluate = lambda folder, step: {}
train(run.objective, loop, folder / "out", None, base.device)
print(told("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_a_fresh_process_grows_by_what_was_planned(tmp_path):
    file, config = tmp_path / "medium.safetensors", medium()
    save_checkpoint(random_system(config), file, dtype=torch.float16)
    asked = work(config, 64, method="full")
    asked = replace(asked, drawn=replace(asked.drawn, tensors=read_header(file).tensors))
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    command = [sys.executable, "-c", TUNE, str(file), str(tmp_path / "pictures"), "full"]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)
    assert growth > 0.8e9
    assert peak(plan_tuning(asked)) == pytest.approx(growth, rel=0.1)

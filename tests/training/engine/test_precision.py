"""The precision of a run: what the device multiplies natively unless told otherwise, the same wherever it is asked."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from line import CONFIG, Line
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import small, tiny
from ldm.pipeline.device import multiplies_bfloat16
from ldm.pipeline.load import random_system
from ldm.training.engine.figures import read_figures
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.muon import orthogonal
from ldm.training.engine.precision import mixed, precision_on, resolved, slowness
from ldm.training.engine.state import load_state
from ldm.training.latents import encode_pictures

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether devices multiply bfloat16 themselves; told by torch, as it tells of this machine's."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param)
    return request.param


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, so far as it is only asked about."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


both = pytest.mark.parametrize("native", [True, False], indirect=True)


class Seen(Line):
    """Remembers in which dtypes its layer answered."""

    dtypes: set[torch.dtype]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.dtypes = {self.layer(batch["x"]).dtype}
        return super().forward(batch)


def test_nothing_said_is_auto() -> None:
    assert LoopConfig(steps=1, batch=1, rate=1.0).precision == "auto"


@both
def test_auto_is_what_the_device_has(native: bool, gpu: None) -> None:
    config = replace(CONFIG, precision="auto")
    assert resolved(config, CPU) == replace(config, precision="bf16" if native else "no")
    assert resolved(config, GPU) == replace(config, precision="bf16" if native else "fp16")
    assert precision_on(torch.device("mps")) == "no"


@both
def test_what_is_asked_for_is_obeyed_and_slowness_is_told(native: bool, gpu: None) -> None:
    assert [precision_on(device, asked) for device in (CPU, GPU) for asked in ("no", "bf16")] == ["no", "bf16"] * 2
    assert precision_on(GPU, "fp16") == "fp16"
    with pytest.raises(LdmError, match="fp16, which needs a GPU"):
        precision_on(CPU, "fp16")
    assert (slowness(CPU, "bf16") is None) == native and (slowness(GPU, "bf16") is None) == native
    assert slowness(CPU, "no") is None and slowness(CPU, "auto") is None and slowness(GPU, "fp16") is None
    if not native:
        assert "this cpu emulates, many times slower; no is faster" in str(slowness(CPU, "bf16"))
        assert "fp16 is faster" in str(slowness(GPU, "bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop runs on the GPU")
@both
def test_the_loop_runs_layers_in_it(native: bool, tmp_path: Path) -> None:
    seen = Seen()
    train(seen, replace(CONFIG, precision="auto", steps=1), tmp_path)
    assert seen.dtypes == {torch.bfloat16 if native else torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop runs on the GPU")
@pytest.mark.parametrize("native", [False], indirect=True)
def test_a_run_that_was_begun_in_bfloat16_goes_on(native: bool, tmp_path: Path) -> None:
    train(Seen(), replace(CONFIG, precision="bf16", steps=5), tmp_path)
    resumed = Seen()  # in the same process
    train(resumed, replace(CONFIG, precision="auto", steps=7), tmp_path)
    assert len(resumed.losses) == 2 and resumed.dtypes == {torch.float32}


def test_fp16_scales_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose steps they are; here on the CPU, where it is slow and refused."""
    monkeypatch.setattr("ldm.training.engine.loop.resolved", lambda config, device: config)
    monkeypatch.setattr("ldm.training.engine.loop.join", lambda device: CPU)
    seen = Seen()
    train(seen, replace(CONFIG, precision="fp16", rate=0.1), tmp_path)
    state = load_state(tmp_path)
    skipped = sum(line.values.get("skipped", 0.0) for line in read_figures(tmp_path))
    assert state is not None and state.numbers["scaler"]["scale"] == 65536.0 / 2**skipped and 0 < skipped < 10
    assert seen.dtypes == {torch.float16} and seen.losses[-1] < 0.5 * seen.losses[0]


@both
def test_latents_and_muon_follow_it(native: bool, tmp_path: Path) -> None:
    half = torch.bfloat16 if native else torch.float32
    assert orthogonal(torch.randn(1, 64, 64)).dtype == half
    autoencoder, found = random_system(tiny(small())).autoencoder, set()
    autoencoder.quant_conv.register_forward_hook(lambda layer, given, said: found.add(said.dtype))
    encode_pictures(autoencoder, np.zeros((1, 64, 64, 3), np.uint8), [{"texts": ["a"]}], tmp_path)  # type: ignore[arg-type]
    assert found == {half}


def test_mixed_is_float32_for_no_and_a_half_otherwise() -> None:
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with mixed(CPU, precision):
            assert layer(x).dtype == dtype


def test_this_cpu_is_known_as_its_kernel_knows_it() -> None:
    told = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not told.exists():
        pytest.skip("no such list of instructions here")
    flags = told.read_text().partition("flags")[2].partition("\n")[0].split()
    assert multiplies_bfloat16(CPU) == bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_nothing_is_said_of_what_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert slowness(torch.device("mps"), "bf16") is None
    for machine, said in (("arm64", False), ("aarch64", False), ("x86_64", True), ("AMD64", True)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert (slowness(CPU, "bf16") is not None) == said

"""`ldm info`: what it says of good, broken and foreign files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.apps.info import FileReport, info, inspect, page
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd2, tiny
from ldm.pipeline.load import random_system
from ldm.weights import io
from ldm.weights.layout import UNET

CONFIG = tiny(sd2("v"))


@pytest.fixture
def path(tiny_file: Callable[[SystemConfig], Path]) -> Path:
    return tiny_file(CONFIG)


def text(report: FileReport, width: int = 120) -> str:
    """The page as a terminal shows it."""
    console = Console(width=width, record=True, file=StringIO())
    console.print(page(report))
    return console.export_text()


def edited(path: Path, tmp_path: Path, extra: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file(load_file(path) | dict(extra), tmp_path / "edited.safetensors", metadata=dict(metadata or {}) or None)
    return tmp_path / "edited.safetensors"


def test_a_checkpoint(path: Path) -> None:
    report = inspect(path)
    assert (report.path, report.size, report.kind) == (str(path), path.stat().st_size, "checkpoint")
    assert report.problem is None
    assert report.system is not None
    assert (report.system.family, report.system.variant) == ("sd2", "text to image")
    assert (report.system.prediction, report.system.prediction_rule) == ("v", "its own ldm.config")
    assert report.system.resolution == CONFIG.size
    assert report.fit is not None
    assert report.fit.fits
    assert report.deep is None
    assert not report.ema


def test_parameters_per_part_are_those_of_the_networks(path: Path) -> None:
    model = random_system(CONFIG)
    networks = {"U-Net": model.unet, "autoencoder": model.autoencoder, "text encoder": model.text[0]}
    for part in inspect(path).parts:
        parameters = list(networks.pop(part.name).parameters())  # type: ignore[attr-defined]
        assert part.parameters == sum(parameter.numel() for parameter in parameters)
        assert part.tensors == len(parameters)
        assert part.dtypes == ("F16",)
    assert not networks


def test_the_page_is_one_page(path: Path) -> None:
    shown = text(inspect(path))
    for expected in ("checkpoint", "sd2, text to image (by its own ldm.config)", "v (by its own", "U-Net", "F16"):
        assert expected in shown
    assert "modelspec.architecture" in shown
    assert "stable-diffusion-v2-768-v" in shown
    assert len(shown.splitlines()) < 40
    assert "ldm.config " not in shown


def test_json_has_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(path, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(inspect(path))))
    info(path)
    assert "sd2, text to image" in capsys.readouterr().out


def test_only_the_header_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "safe_open", lambda *_, **__: pytest.fail("numbers were read"))
    assert inspect(path).problem is None


def test_a_broken_checkpoint_still_gets_its_report(path: Path, tmp_path: Path) -> None:
    strange = {f"{UNET}new{i}": torch.ones(1) for i in range(12)} | {"model_ema.decay": torch.ones(())}
    report = inspect(edited(path, tmp_path, strange | {f"{UNET}out.2.bias": torch.ones(7), "nobody": torch.ones(1)}))
    assert report.problem == "its tensors do not fit its networks"
    assert report.ema
    assert report.fit is not None
    assert len(report.fit.unexpected) == 12
    assert report.fit.misshapen == (f"{UNET}out.2.bias is (7,), expected (4,)",)
    assert report.fit.unknown == ("nobody",)
    assert report.fit.not_needed == {"EMA copies": 1}
    shown = text(report, width=200)
    assert "PROBLEM" in shown
    assert "and 2 more" in shown
    assert "EMA weights present: using the ordinary ones" in shown
    assert "other tensors" in shown


def test_a_missing_part_is_the_problem(path: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report.problem is not None
    assert "the autoencoder is missing" in report.problem
    assert report.system is None
    assert "the autoencoder is missing" in text(report, width=250)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.alpha": torch.ones(())}, path)
    report = inspect(path)
    assert report.kind == "LoRA or another adapter"
    assert (report.system, report.fit, report.problem) == (None, None, None)
    (part,) = report.parts
    assert (part.name, part.tensors, part.parameters, part.dtypes) == ("other tensors", 2, 33, ("F32",))
    assert "LoRA" in text(report)


def test_bad_files_raise(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    with pytest.raises(LdmError, match="looks like HTML"):
        info(tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match="is a folder"):
        info(tmp_path)


def test_a_deep_look(path: Path, tmp_path: Path) -> None:
    deep = inspect(path, deep=True).deep
    assert deep is not None
    assert deep.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert deep.hash_agrees is True
    assert (deep.non_finite, deep.all_zero) == ((), ())
    bad = {
        f"{UNET}out.2.bias": torch.tensor([1.0, float("nan"), 0.0, 0.0]),
        f"{UNET}out.0.bias": torch.full((32,), float("inf")),
        f"{UNET}out.2.weight": torch.zeros(4, 32, 3, 3),
    }
    report = inspect(edited(path, tmp_path, bad, {"modelspec.hash_sha256": "0x" + "0" * 64}), deep=True)
    assert report.problem == "2 of its tensors hold numbers that are not finite"
    assert report.deep is not None
    assert set(report.deep.non_finite) == {f"{UNET}out.2.bias", f"{UNET}out.0.bias"}
    assert report.deep.all_zero == (f"{UNET}out.2.weight",)
    assert report.deep.hash_agrees is False
    assert "DOES NOT AGREE" in text(report)
    assert report.deep.sha256[:10] in text(report)
    assert inspect(edited(path, tmp_path, {}), deep=True).deep.hash_agrees is None  # type: ignore[union-attr]


def test_metadata_cannot_play_with_the_terminal(path: Path, tmp_path: Path) -> None:
    metadata = {f"k{i}": "v" for i in range(20)} | {"a": "[bold]x[/nope] \x1b[2J\r\n\u202e" + "y" * 500}
    shown = text(inspect(edited(path, tmp_path, {}, metadata)), width=250)
    assert "[bold]x[/nope] \\x1b[2J\\r\\n\\u202e" in shown
    assert "\x1b" not in shown
    assert "y" * 200 not in shown.replace("\n", "").replace(" ", "")
    assert "11 entries (see --json)" in shown

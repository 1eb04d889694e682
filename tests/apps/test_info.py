"""`ldm info`: what it says of good, broken and foreign files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.apps.info import as_json_object, info
from ldm.apps.output.info_page import page
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd2, tiny
from ldm.pipeline.load import random_system
from ldm.weights import io
from ldm.weights.doctor.describe import describe
from ldm.weights.doctor.report import FileReport, Numbers
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
    report = describe(path)
    assert (report.path, report.size, report.kind) == (str(path), path.stat().st_size, "checkpoint")
    assert report.problem is None
    system, fit = report.found.system, report.found.fit
    assert system is not None
    assert (system.family, system.variant) == ("sd2", "text to image")
    assert (system.prediction, system.prediction_rule) == ("v", "its own ldm.config")
    assert system.resolution == CONFIG.size
    assert fit is not None
    assert fit.fits
    assert report.numbers is None
    assert not report.ema


def test_parameters_per_part_are_those_of_the_networks(path: Path) -> None:
    model = random_system(CONFIG)
    networks = {"U-Net": model.unet, "autoencoder": model.autoencoder, "text encoder": model.text[0]}
    for part in describe(path).parts:
        parameters = list(networks.pop(part.name).parameters())  # type: ignore[attr-defined]
        assert part.parameters == sum(parameter.numel() for parameter in parameters)
        assert part.tensors == len(parameters)
        assert part.dtypes == ("F16",)
    assert not networks


def test_the_page_is_one_page(path: Path) -> None:
    shown = text(describe(path))
    for expected in (
        "checkpoint",
        "Stable Diffusion 2.x, text to image (its own ldm.config)",
        "v (its own",
        "U-Net",
        "F16",
    ):
        assert expected in shown
    assert "stable-diffusion-v2-768-v" in shown
    assert len(shown.splitlines()) < 40
    assert "ldm.config " not in shown


def test_json_has_everything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info(path, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json_object(describe(path))))
    info(path)
    assert "Stable Diffusion 2.x, text to image" in capsys.readouterr().out


def test_only_the_header_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_mapped", lambda *_: pytest.fail("numbers were read"))
    assert describe(path).problem is None


def test_a_broken_checkpoint_still_gets_its_report(path: Path, tmp_path: Path) -> None:
    strange = {f"{UNET}new{i}": torch.ones(1) for i in range(12)} | {"model_ema.decay": torch.ones(())}
    report = describe(edited(path, tmp_path, strange | {f"{UNET}out.2.bias": torch.ones(7), "nobody": torch.ones(1)}))
    assert report.problem == "its tensors do not fit its networks: 12 unexpected, 1 of another shape or dtype"
    assert report.ema
    fit = report.found.fit
    assert fit is not None
    assert len(fit.unexpected) == 12
    assert fit.misshapen == (f"{UNET}out.2.bias is (7,), expected (4,)",)
    assert fit.unknown == ("nobody",)
    assert fit.not_needed == {"EMA copies": 1}
    shown = text(report, width=200)
    assert "PROBLEM" in shown
    assert "and 2 more" in shown
    assert "EMA weights present: using the ordinary ones" in shown
    assert "other tensors" in shown


def test_a_missing_part_is_the_problem(path: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "x.safetensors")
    report = describe(tmp_path / "x.safetensors")
    assert report.problem is not None
    assert "without autoencoder" in report.problem
    assert report.found.system is None
    assert "without autoencoder" in text(report, width=250)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.alpha": torch.ones(())}, path)
    report = describe(path)
    assert report.kind == "adapter"
    assert (report.found.system, report.found.fit) == (None, None)
    assert report.problem == "lora_unet_x: lacks its up; the file is incomplete"
    (part,) = report.parts
    assert (part.name, part.tensors, part.parameters, part.dtypes) == ("U-Net", 2, 33, ("F32",))
    assert "LoRA" in text(report)


def test_bad_files_raise(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    with pytest.raises(LdmError, match="looks like HTML"):
        info(tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match="1 of 1 models have a problem, as x"):
        info(tmp_path)


def test_a_deep_look(path: Path, tmp_path: Path) -> None:
    report = describe(path, deep=True)
    assert report.hashes.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.hashes.checks == {"modelspec.hash_sha256": True}
    assert report.numbers == Numbers((), ())
    bad = {
        f"{UNET}out.2.bias": torch.tensor([1.0, float("nan"), 0.0, 0.0]),
        f"{UNET}out.0.bias": torch.full((32,), float("inf")),
        f"{UNET}out.2.weight": torch.zeros(4, 32, 3, 3),
    }
    report = describe(edited(path, tmp_path, bad, {"modelspec.hash_sha256": "0x" + "0" * 64}), deep=True)
    assert report.problem == "2 of its tensors hold numbers that are not finite"
    assert report.numbers is not None
    assert set(report.numbers.non_finite) == {f"{UNET}out.2.bias", f"{UNET}out.0.bias"}
    assert report.numbers.all_zero == (f"{UNET}out.2.weight",)
    assert report.hashes.checks == {"modelspec.hash_sha256": False}
    assert report.warnings == ("modelspec.hash_sha256 in its metadata does not agree with its numbers",)
    assert "DOES NOT AGREE" in text(report)
    assert f"AutoV2 {str(report.hashes.sha256)[:10]}" in text(report)
    assert describe(edited(path, tmp_path, {}), deep=True).hashes.checks == {}


def test_metadata_cannot_play_with_the_terminal(path: Path, tmp_path: Path) -> None:
    metadata = {f"k{i}": "v" for i in range(20)} | {"a": "[bold]x[/nope] \x1b[2J\r\n\u202e" + "y" * 500}
    shown = text(describe(edited(path, tmp_path, {}, metadata)), width=250)
    assert "[bold]x[/nope] \\x1b[2J\\r\\n\\u202e" in shown
    assert "\x1b" not in shown
    assert "y" * 200 not in shown.replace("\n", "").replace(" ", "")
    assert "11 entries (see --json)" in shown

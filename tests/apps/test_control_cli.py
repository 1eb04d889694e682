"""`--control` and its company on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.apps.cli import main
from ldm.apps.flags.controls import control_name
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import SystemConfig, sd1, small, tiny
from ldm.pipeline.metadata.read import read_metadata


def write_control(path: Path, system: SystemConfig) -> None:
    """A small ControlNet's file with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = ControlNet(ControlNetConfig(system.unet, hint_widths=(8, 8, 16, 16)))
    save_file({name: torch.randn(t.shape) * 0.1 for name, t in network.state_dict().items()}, path)


@pytest.fixture
def folder(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with a control network and a picture, and a tiny model by default."""
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small()))))
    monkeypatch.chdir(tmp_path)
    write_control(tmp_path / "net.safetensors", tiny(small()))
    Image.effect_noise((96, 96), 80).convert("RGB").save("edges.png")
    return tmp_path


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name), dtype=int)


def test_a_picture_under_control(folder, capsys):
    plain = ["generate", "x", "--seed", "1", "--steps", "3", "-o", "plain.png"]
    held = ["generate", "x", "--seed", "1", "--steps", "3", "-o", "held.png", "--control", "net.safetensors"]
    assert main(plain) == 0 and main([*held, "--control-image", "edges.png", "--control-weight", "0.5"]) == 0
    assert np.abs(pixels("plain.png") - pixels("held.png")).max() > 8
    record = read_metadata("held.png").record
    assert record is not None
    (control,) = record["request"]["controls"]
    assert (control["network"], control["weight"], control["end"]) == ("net", 0.5, 1.0)


def test_two_with_their_own_weights_and_a_share_for_both(folder):
    write_control(folder / "other.safetensors", tiny(small()))
    pair = ["--control", "net.safetensors", "--control-image", "edges.png"]
    pair += ["--control", "other.safetensors", "--control-image", "edges.png"]
    flags = ["--control-weight", "0.5", "--control-weight", "0.25", "--control-end", "0.7", "--guess", "--canny"]
    assert main(["generate", "x", "--seed", "1", "--steps", "2", *pair, *flags]) == 0
    record = read_metadata("x-1.png").record
    assert record is not None
    found = [(c["network"], c["weight"], c["end"], c["guess"], c["canny"]) for c in record["request"]["controls"]]
    assert found == [("net", 0.5, 0.7, True, True), ("other", 0.25, 0.7, True, True)]


def test_found_by_name_and_over_a_picture(folder):
    (folder / "models" / "controlnet").mkdir(parents=True)
    (folder / "net.safetensors").rename(folder / "models" / "controlnet" / "net.safetensors")
    control = ["--control", "net", "--control-image", "edges.png", "--models", "models"]
    assert main(["img2img", "x", "--image", "edges.png", "--seed", "1", "--steps", "4", *control]) == 0
    assert Image.open("x-1.png").size == (64, 64)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no picture": (["--control", "net.safetensors"], "control-image: found 0 for 1 --control, expected one for each"),
    "no network": (["--control-image", "edges.png"], "control-image: found 1 for 0 --control, expected one for each"),
    "alone": (["--guess"], "control: found none for the flags that go with it"),
    "weights": (
        ["--control", "net", "--control-image", "edges.png", "--control-weight", "1", "--control-weight", "2"],
        "control-weight: found 2 for 1 --control, expected one for all or one for each",
    ),
    "weight": (
        ["--control", "net", "--control-image", "edges.png", "--control-weight", "9"],
        "control: weight: found 9.0, expected a number from 0 to 2",
    ),
    "missing file": (["--control", "none.safetensors", "--control-image", "edges.png"], "none.safetensors: "),
    "missing picture": (["--control", "net.safetensors", "--control-image", "none.png"], "none.png: cannot be read"),
    "picture": (["--control", "net.safetensors", "--control-image", "net.safetensors"], "control: image: found"),
    "same name": (
        ["--control", "net", "--control-image", "edges.png", "--control", "a/net", "--control-image", "edges.png"],
        "control: two files are called net; rename one",
    ),
    "another base": (
        ["--control", "sd1.safetensors", "--control-image", "edges.png"],
        "sd1.safetensors: does not fit the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, folder, capsys):
    flags, message = REFUSED[case]
    write_control(folder / "sd1.safetensors", tiny(sd1()))
    assert main(["generate", "x", "--steps", "1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(folder.glob("x*.png"))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a/canny.safetensors", "canny"),
        ("control_v11p.PTH", "control_v11p"),
        ("sd-controlnet-v1.1", "sd-controlnet-v1.1"),
        ("x.safetensors.index.json", "x.safetensors"),
    ],
)
def test_names(given, name):
    assert control_name(given) == name

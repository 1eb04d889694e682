"""`ldm generate --vae`, `--preview`: the tiny autoencoder and the file in which pictures are watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from ldm.apps.cli import main
from ldm.models.presets import SystemConfig, sd1, tiny


@pytest.fixture
def folder(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with a tiny autoencoder; a tiny model by default."""
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(sd1()))))
    monkeypatch.delenv("LDM_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    widths = (8,) * 4
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).save_pretrained("taesd")
    return tmp_path


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"), dtype=int)


DRAW = "generate fox --seed 1 --steps 4 --sampler euler --dtype float32 --count 2"


def test_after_the_last_step_a_preview_is_the_picture(folder: Path) -> None:
    main([*DRAW.split(), "--vae", "taesd", "--preview", "new/p.png", "--preview-vae", "taesd", "--preview-every", "2"])
    expected = np.concatenate([pixels("fox-1.png"), pixels("fox-2.png")], axis=1)
    assert np.array_equal(pixels("new/p.png"), expected)
    assert [path.name for path in Path("new").iterdir()] == ["p.png"]


def test_a_preview_is_written_every_few_steps(folder: Path) -> None:
    """Every three of four steps there is one, which is not yet the picture; pictures do not depend on it."""
    main([*DRAW.split(), "-o", "plain"])
    main([*DRAW.split(), "-o", "watched", "--preview", "p.webp", "--preview-every", "3"])
    main([*DRAW.split(), "-o", "last", "--preview", "last.webp", "--preview-every", "4"])
    main([*DRAW.split(), "-o", "never", "--preview", "never.webp", "--preview-every", "5"])
    assert pixels("p.webp").shape == (64, 128, 3)
    assert not np.array_equal(pixels("p.webp"), pixels("last.webp"))
    assert not Path("never.webp").exists()
    assert np.array_equal(pixels("plain/fox-1.png"), pixels("watched/fox-1.png"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--preview-vae taesd", "--preview-vae: expected --preview PATH too"),
        ("--preview p.txt", "p.txt: expected a name that ends in .png, .jpg or .webp, for --preview"),
        ("--preview p.png --preview-every 0", "--preview-every: found 0, expected 1 step or more"),
        ("--preview p.png --preview-vae nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(flags: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DRAW.split(), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not list(folder.glob("*.png"))

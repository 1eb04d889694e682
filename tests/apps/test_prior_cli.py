"""`--prior`: text to picture by way of a prior in one command, and made again by `ldm redo`; and `ldm prior`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.apps.cli import main
from ldm.apps.sequences import KEYWORD
from ldm.models.presets import small, small_decoder, tiny
from ldm.models.prior import Prior, PriorConfig
from ldm.pipeline.load import load
from ldm.pipeline.request import PriorUse
from ldm.weights.prior import save_prior

CONFIG = PriorConfig(projection=32, text_width=32, width=32, layers=1, heads=2)
QUICK = ["--steps", "1", "--device", "cpu", "--dtype", "float32"]
ASKED = ["--prior", "p.safetensors", "--prior-steps", "2"]


@pytest.fixture
def folder(tiny_file, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small_decoder()))))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    save_prior("p.safetensors", Prior(CONFIG))
    return tmp_path


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_generate_and_redo(folder, capsys):
    drawing = ["generate", "a (red:1.2) apple", *ASKED, "--prior-choose", "3", "--seed", "7", "--count", "2", *QUICK]
    assert main([*drawing, "-o", "a.png"]) == 0
    model = load(device="cpu", dtype="float32").with_prior("p.safetensors")
    use = PriorUse(steps=2, choose=3)
    expected = model.generate("a (red:1.2) apple", seed=7, count=2, steps=1, prior=use)
    for path, picture in zip(("a.png", "a-2.png"), expected, strict=True):
        assert np.array_equal(pixels(path), np.asarray(picture.image))
    capsys.readouterr()
    redoing = ["redo", "a-2.png", "--prior", "p.safetensors", "--device", "cpu"]
    assert main(redoing) == 0
    out, err = capsys.readouterr()
    assert "bit-identical to the original" in out and "warning" not in err
    assert main(["show", "a.png"]) == 0
    assert "ldm redo a.png --prior FILE" in capsys.readouterr().out


def test_redo_knows_the_prior(folder, capsys, monkeypatch):
    """The one that ships is taken where it is the one told; another is said to be another."""
    assert main(["generate", "a pear", *ASKED, "-o", "a.png", *QUICK]) == 0
    assert main(["generate", "a pear", "-o", "plain.png", *QUICK]) == 0
    capsys.readouterr()
    assert main(["redo", "a.png", "--device", "cpu"]) == 2
    assert 'prior: found none, expected the one that was asked what to draw (kind "prior", name "p.safetensors"' in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("ldm.pipeline.clip.prior.SHIPPED_PRIOR", folder / "p.safetensors")
    assert main(["redo", "a.png", "--device", "cpu"]) == 0
    assert "bit-identical" in capsys.readouterr().out
    save_prior("q.safetensors", Prior(CONFIG))
    assert main(["redo", "a.png", "--prior", "q.safetensors", "--device", "cpu"]) == 0
    assert 'parts: the picture was made with kind "prior", name "p.safetensors"' in capsys.readouterr().err
    assert main(["redo", "plain.png", "--prior", "p.safetensors", "--device", "cpu"]) == 2
    assert "prior: found one, but the picture was made without; leave it out" in capsys.readouterr().err


def test_img2img_and_grid(folder):
    Image.linear_gradient("L").resize((64, 64)).save("start.png")
    assert main(["img2img", "a pear", "--image", "start.png", *ASKED, "-o", "b.png", "--steps", "2", *QUICK[2:]]) == 0
    grid = ["grid", "a pear", "--x", "prior-guidance=1,8", "--cells", "cells", *ASKED, "--seed", "1", *QUICK]
    assert main(grid) == 0
    one, other = sorted(Path("cells").iterdir())
    assert not np.array_equal(pixels(str(one)), pixels(str(other)))


def test_the_sheet(folder, capsys):
    asked = ["prior", "a pear", "a plum", *ASKED, "--seed", "3", "-o", "s.png", *QUICK]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 6
    sheet = Image.open("s.png")
    record = json.loads(sheet.info[KEYWORD])
    assert record["prompts"] == ["a pear", "a plum"] and record["prior"]["steps"] == 2
    assert record["prior_file"][0]["name"] == "p.safetensors"
    model = load(device="cpu", dtype="float32").with_prior("p.safetensors")
    (last,) = model.generate("a plum", seed=4, steps=1, prior=PriorUse(steps=2))
    width, height = last.image.size
    corner = sheet.width - 4 - width, sheet.height - 4 - height
    assert np.array_equal(np.asarray(sheet.crop((*corner, sheet.width - 4, sheet.height - 4))), np.asarray(last.image))


def test_what_is_refused(folder, capsys, tiny_file):
    other = str(tiny_file(tiny(small())))
    save_prior("other.safetensors", Prior(replace(CONFIG, clip=(9.0,) * 8)))
    for arguments, message in (
        (
            ["generate", "a", "--prior", "other.safetensors"],
            "other.safetensors: prior: it was trained for another CLIP",
        ),
        (["generate", "a", "--prior", "p.safetensors", "--model", other], "is told no CLIP embeddings, which a prior"),
        (["generate", "a", "--prior", "none.safetensors"], "none.safetensors: "),
        (["generate", "a", "--prior", other], "is no prior: its metadata has no ldm.prior"),
        (["generate", "a", "--prior-steps", "3"], "prior: found none for the flags that go with it, expected its file"),
        (["generate", "a", *ASKED, "--prior-choose", "65"], "prior: choose: found 65, expected a whole number from 1"),
        (["prior"], "prompt: found none, expected what to draw"),
        (["prior", "a", "--prior-guidance", "nan"], "prior: guidance: found nan"),
        (["prior", "a", "-o", "s.jpg"], "s.jpg: expected a name that ends in .png"),
    ):
        assert main([*arguments, *QUICK]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not list(folder.glob("*.png"))

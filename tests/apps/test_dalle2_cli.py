"""`ldm interpolate`, `ldm textdiff`, `ldm pca` and `ldm variations --inverted`: sheets, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.apps.cli import main, parse
from ldm.apps.flags.commands import Variations
from ldm.apps.flags.requests import requests_of
from ldm.apps.sequences import KEYWORD
from ldm.models.presets import small, small_decoder, tiny
from ldm.pipeline.clip.components import read_components
from ldm.pipeline.load import load
from ldm.pipeline.picture import Picture

QUICK = ["--steps", "1", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def folder(tiny_file, monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("LDM_MODEL", str(tiny_file(tiny(small_decoder()))))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(name)
    return tmp_path


def record_in(sheet: Image.Image) -> dict[str, Any]:
    return json.loads(sheet.info[KEYWORD])


def tiles(path: str, rows: int, columns: int, drawn: list[Picture]) -> Image.Image:
    """The sheet, each of whose tiles is known to be the picture that the library draws."""
    sheet = Image.open(path)
    width, height = drawn[0].image.size
    left = sheet.width - 4 - columns * (width + 4) + 4
    top = sheet.height - 4 - rows * (height + 4) + 4
    for index, one in enumerate(drawn):
        corner = left + index % columns * (width + 4), top + index // columns * (height + 4)
        tile = sheet.crop((*corner, corner[0] + width, corner[1] + height))
        assert np.array_equal(np.asarray(tile), np.asarray(one.image))
    return sheet


def test_interpolate(folder, capsys):
    arguments = ["interpolate", "a.png", "b.png", "--frames", "3", "--rows", "own,7", "-o", "sheet.png", *QUICK]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("sheet.png  6 pictures  ")
    model = load(device="cpu", dtype="float32")
    sheet = tiles("sheet.png", 2, 3, model.interpolate("a.png", "b.png", frames=3, rows=(None, 7), steps=1, seed=0))
    record = record_in(sheet)
    assert (record["command"], record["frames"], record["rows"]) == ("interpolate", 3, [None, 7])
    assert record["request"]["sampler"] == "ddim" and record["request"]["seed"] == 0
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "sheet-2.png"


def test_textdiff(folder, capsys):
    assert main(["textdiff", "a.png", "--from", "a cat", "--to", "a lion", "--frames", "2", "-o", "t.png", *QUICK]) == 0
    assert "t.png  2 pictures" in capsys.readouterr().out
    model = load(device="cpu", dtype="float32")
    sheet = tiles("t.png", 1, 2, model.textdiff("a.png", "a cat", "a lion", frames=2, steps=1, seed=0))
    record = record_in(sheet)
    assert (record["from"], record["to"], record["thetas"]) == ("a cat", "a lion", [0, 0.5])


def test_pca_of_the_pictures_themselves(folder, capsys):
    assert main(["pca", "a.png", "b.png", "c.png", "--write", "k.safetensors", "-o", "p.png", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "p.png  9 pictures" in out and err.count("note:") == 1  # three of each: of 1, of 2, of all
    model = load(device="cpu", dtype="float32")
    expected = model.pca(["a.png", "b.png", "c.png"], [1, 2, None], steps=1, seed=0)
    sheet = Image.open("p.png")
    assert record_in(sheet)["components"] == [1, 2, None]
    corner = sheet.width - 4 * 68, sheet.height - 3 * 68
    assert np.array_equal(
        np.asarray(sheet.crop((*corner, corner[0] + 64, corner[1] + 64))), np.asarray(expected[0].image)
    )
    original = sheet.crop((sheet.width - 68, corner[1], sheet.width - 4, corner[1] + 64))
    assert np.array_equal(np.asarray(original), np.asarray(Image.open("a.png")))
    assert len(read_components("k.safetensors").components) == 2
    assert main(["pca", "a.png", "--statistics", "k.safetensors", "--components", "2,all", *QUICK]) == 0
    assert "pca.png  2 pictures" in capsys.readouterr().out


def test_pca_of_a_folder_names_what_is_no_picture(folder, capsys):
    (folder / "of").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / "of" / name).write_bytes((folder / name).read_bytes())
    (folder / "of" / "bad.png").write_bytes(b"nothing")
    assert main(["pca", "a.png", "--of", "of", "--components", "1", *QUICK]) == 0
    assert "warning: of/bad.png: image: found another kind of file" in capsys.readouterr().err


def test_variations_that_begin_in_the_pictures_own_noise(folder, capsys):
    arguments = ["variations", "--image", "a.png", "--inverted", "--eta", "0.5", "--count", "2", "--seed", "3", *QUICK]
    assert main([*arguments, "--guidance", "1", "-o", "v.png"]) == 0
    assert capsys.readouterr().out.count("seed") == 2
    model = load(device="cpu", dtype="float32")
    fields = {"vary_inverted": True, "sampler": "ddim", "guidance": 1.0, "eta": 0.5, "steps": 1}
    (second,) = model.variations("", "a.png", seed=4, **fields)
    assert np.array_equal(np.asarray(Image.open("v-2.png")), np.asarray(second.image))
    capsys.readouterr()
    assert main(["redo", "v-2.png", "--vary", "a.png", "-o", "again.png", "--device", "cpu", "--dtype", "float32"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(second.image))


def test_a_sampler_that_was_chosen_is_not_exchanged(folder, capsys):
    command = parse(["variations", "--image", "a.png", "--inverted"])
    assert isinstance(command, Variations) and requests_of(command)[0].sampler == "ddim"
    assert main(["variations", "--image", "a.png", "--inverted", "--sampler", "euler"]) == 2
    assert "vary_inverted: found with sampler euler, expected ddim" in capsys.readouterr().err


INTERPOLATE = "interpolate a.png b.png --steps 1"
TEXTDIFF = "textdiff a.png --steps 1 --to lion --from"
REFUSED = {
    "no second picture": ("interpolate a.png", "B"),
    "a picture that is none": ("interpolate a.png gone.png", "gone.png: cannot be read"),
    "one frame": (f"{INTERPOLATE} --frames 1", "frames: found 1, expected 2 or more"),
    "rows": (f"{INTERPOLATE} --rows own,x", 'rows: found "x", expected whole numbers or own'),
    "too many": (f"{INTERPOLATE} --frames 401", "sheet: found 401 pictures, expected at most 400"),
    "output": (f"{INTERPOLATE} -o sheet.jpg", "sheet.jpg: expected a name that ends in .png"),
    "eta": (f"{INTERPOLATE} --eta 2", "eta: found 2"),
    "theta": (f"{TEXTDIFF} cat --theta 0", "theta: found 0, expected above 0 and at most 1"),
    "the same twice": (f"{TEXTDIFF} lion", 'captions: found "lion" and "lion", which say the same to CLIP'),
    "no captions": ("textdiff a.png --from x", "--to"),
    "one picture": ("pca a.png --steps 1", "components: found 1 picture, expected two or more"),
    "too many components": ("pca a.png b.png --components 1,2", "components: found 2, expected 0 to 1"),
    "components": ("pca a.png b.png --components 1,most", 'components: found "most", expected whole numbers or all'),
    "an empty folder": ("pca a.png --of empty", "empty: found no PNG, JPEG or WebP picture"),
    "two sources": ("pca a.png --of . --statistics k.safetensors", "statistics: found together with --of"),
    "no statistics": ("pca a.png --statistics a.png", "a.png"),
    "a file in the way": ("pca a.png b.png --write b.png", "b.png: exists already, and nothing is overwritten"),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_one_line(line, message, folder, capsys):
    (folder / "empty").mkdir()
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "c.png", "empty"]


def test_a_model_that_is_told_no_pictures(folder, tiny_file, capsys):
    other = str(tiny_file(tiny(small())))
    for line in ("interpolate a.png b.png", "textdiff a.png --from x --to y", "pca a.png b.png"):
        assert main([*line.split(), "--model", other]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_decoder_that_ships_is_what_draws(folder, monkeypatch, capsys):
    monkeypatch.delenv("LDM_MODEL")
    monkeypatch.setattr("ldm.pipeline.load.SHIPPED_DECODER", folder / "ldm-decoder.safetensors")
    for line in ("interpolate a.png b.png", "variations --image a.png"):
        assert main(line.split()) == 2
        err = capsys.readouterr().err
        assert "ldm-decoder.safetensors: the decoder that ships with this package is missing" in err


def test_what_the_shipped_decoder_drew_is_drawn_again_by_it(folder, tiny_file, monkeypatch, capsys):
    monkeypatch.delenv("LDM_MODEL")
    monkeypatch.setattr("ldm.pipeline.load.SHIPPED", folder / "gone.safetensors")
    monkeypatch.setattr("ldm.pipeline.load.SHIPPED_DECODER", tiny_file(tiny(small_decoder())))
    assert main(["variations", "--image", "a.png", "--seed", "3", "-o", "v.png", *QUICK]) == 0
    capsys.readouterr()
    assert main(["redo", "v.png", "--vary", "a.png", "-o", "again.png", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "bit-identical" in out and err == ""

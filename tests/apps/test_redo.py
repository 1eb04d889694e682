"""`ldm redo` and `ldm show`: pictures made again, what is said of them, and what they cannot make us do."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm.apps.cli import main
from ldm.apps.redo import difference, same_file
from ldm.models.presets import SystemConfig, small, tiny
from ldm.pipeline.load import random_system, save_checkpoint
from ldm.pipeline.metadata.read import read_metadata


@pytest.fixture
def tiny_model(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model as the one that is loaded by default, and an empty working folder."""
    path = tiny_file(tiny(small()))
    monkeypatch.setenv("LDM_MODEL", str(path))
    monkeypatch.delenv("LDM_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


def written(path: str, **chunks: str) -> None:
    """A PNG with text chunks."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in chunks.items():
        info.add_text(keyword, text)
    Image.new("RGB", (64, 64), "red").save(path, pnginfo=info)


def infotext(model: str, prompt: str = "x") -> str:
    return (
        f"{prompt}\nSteps: 2, Sampler: Euler a, Schedule type: Karras, CFG scale: 3, Seed: 5, Size: 64x64, {model},"
        " Version: v1.10.1"
    )


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_our_own_picture_is_the_same_bit_for_bit(name, tiny_model, tmp_path, capsys):
    assert main(["generate", "a (red:1.2) apple", "--steps", "2", "--sampler", "euler-a", "-o", name]) == 0
    assert main(["redo", name]) == 0
    out, err = capsys.readouterr()
    again = f"a-redo{Path(name).suffix}"
    assert out.splitlines()[-1] == f"{again}  bit-identical to the original" and err == ""
    one, other = (np.asarray(Image.open(tmp_path / each)) for each in (name, again))
    assert np.array_equal(one, other)
    assert read_metadata(name).request() == read_metadata(again).request()


@pytest.mark.parametrize(
    "fields", [("--seed", "4"), ("--seed", "4", "--rng", "comfy"), ("--variation-strength", "0.3")]
)
def test_a_picture_of_a_batch_is_drawn_in_the_same_batch(fields, tiny_model, tmp_path, capsys):
    """On a batch, sums are rounded otherwise than alone."""
    assert main(["generate", "x", "--steps", "3", "--count", "3", *fields, "-o", "drawn"]) == 0
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [read_metadata(path).record["batch"][1] for path in drawn] == [3, 3, 3]
    for path in drawn:
        assert main(["redo", str(path), "-o", "again"]) == 0
    out, err = capsys.readouterr()
    assert out.count("bit-identical") == 3 and err == ""


@pytest.mark.parametrize("batch", [[5, 3], [-1, 3], [2, 10**9], [1, 2]])
def test_a_batch_that_cannot_be(batch, tiny_model, tmp_path, capsys):
    assert main(["generate", "x", "--steps", "1", "--seed", "0", "-o", "a.png"]) == 0
    record = read_metadata("a.png").record | {"batch": batch}
    written("b.png", ldm=json.dumps(record))
    assert main(["redo", "b.png"]) == 2
    assert "batch: found place" in capsys.readouterr().err


def test_a_picture_that_began_with_a_picture(tiny_model, tmp_path, capsys):
    for name, colour in (("in.png", "red"), ("other.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(name)
    assert main(["img2img", "x", "--image", "in.png", "--steps", "4", "--seed", "1", "-o", "a.png"]) == 0
    assert main(["redo", "a.png"]) == 2
    digest = hashlib.sha256(Path("in.png").read_bytes()).hexdigest()
    assert f"image: found none, expected the file that the picture was made from (SHA-256 {digest})" in (
        capsys.readouterr().err
    )
    assert main(["redo", "a.png", "--image", "in.png"]) == 0
    out, err = capsys.readouterr()
    assert "bit-identical" in out and err == ""
    assert main(["redo", "a.png", "--image", "other.png", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert f"other.png: is not the file that the picture was made from, whose SHA-256 is {digest}" in err
    assert facts["path"] == "a-redo-2.png" and not facts["difference"]["identical"]


def test_another_model(tiny_model, tmp_path, capsys, monkeypatch):
    """It has to be named, or to lie in folders that are named, and is held to its hash."""
    Path("folder").mkdir()
    save_checkpoint(random_system(tiny(small()), seed=5), "folder/mine.safetensors")
    assert main(["generate", "x", "--model", "folder/mine.safetensors", "--steps", "1", "-o", "a.png"]) == 0
    monkeypatch.setenv("LDM_MODELS", "folder")  # which alone is no leave to open what the metadata names
    assert main(["redo", "a.png"]) == 2
    assert 'model: the picture\'s is "mine" [' in capsys.readouterr().err
    for more in (["--model", "folder/mine.safetensors"], ["--models", "folder"]):
        assert main(["redo", "a.png", *more]) == 0
        out, err = capsys.readouterr()
        assert "bit-identical" in out and err == ""
    assert main(["redo", "a.png", "--model", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    assert "warning: model: is " in err and "differs by" in out and "PSNR" in out
    save_checkpoint(random_system(tiny(small()), seed=6), "folder/mine.safetensors2")
    Path("folder/mine.safetensors2").replace("folder/mine.safetensors")
    assert main(["redo", "a.png", "--models", "folder"]) == 2  # another file of that name is not loaded


def test_the_web_ui(tiny_model, capsys):
    """Its text chooses the seed and the sampler; the model by its hash, or the one that is given."""
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()[:10]
    written("a.png", parameters=infotext(f"Model hash: {digest}, Model: x", "x <lora:y:1>"))
    assert main(["redo", "a.png"]) == 0
    out, err = capsys.readouterr()
    assert "differs by" in out and "cannot be matched: numbers:" in err and 'without its adapters ("y"); give' in err
    request = read_metadata("a-redo.png").request()
    assert request is not None and (request.seed, request.sampler, request.rng) == (5, "euler-a", "philox")
    written("b.png", parameters=infotext("Model: /etc/passwd"))
    assert main(["redo", "b.png"]) == 2 and main(["redo", "b.png", "--models", "."]) == 2
    assert capsys.readouterr().err.count("\n") >= 2


def test_a_picture_without_a_seed(tiny_model, capsys):
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()[:10]
    written("a.png", parameters=infotext(f"Model hash: {digest}").replace("Seed: 5, ", ""))
    assert main(["redo", "a.png"]) == 0
    assert "cannot be matched: seed: none is told, so one is drawn" in capsys.readouterr().err


def test_a_picture_that_was_held_needs_what_held_it(tiny_model, capsys):
    Image.new("RGB", (64, 64)).save("in.png")
    control = {"network": "canny", "image_sha256": None}
    written("a.png", ldm=json.dumps({"request": {"prompt": "x", "controls": [control]}}))
    assert main(["redo", "a.png", "--control-image", "in.png"]) == 2
    assert "control: found none, expected each ControlNet" in capsys.readouterr().err


def test_comfyui(tiny_model, capsys):
    graph = {
        "1": {"class_type": "KSampler", "inputs": {
            "seed": 3, "steps": 2, "cfg": 2.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
            "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "model": ["4", 0]}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "hi", "clip": ["4", 1]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "../x.ckpt"}},
    }  # fmt: skip
    written("a.png", prompt=json.dumps(graph))
    assert main(["redo", "a.png"]) == 2
    assert main(["redo", "a.png", "--model", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    assert out.count("differs by") == 2 and "no hash was told to check it by" in err
    request = read_metadata("a-redo-2.png").request()
    assert request is not None and (request.rng, request.seed, request.batch_index) == ("comfy", 3, 1)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({}, "a.png: says nothing of how it was made"),
        ({"ldm": '{"request": {"prompt": "x", "steps": "2"}}'}, 'steps: found "2", expected a whole number'),
        ({"ldm": '{"request": {"prompt": ["x"]}}'}, "prompt: found ['x'], expected a text"),
        ({"ldm": '{"request": {"steps": 2}}'}, "prompt: found none"),
        ({"ldm": '{"request": {"prompt": "x", "width": 100000}}'}, "width: found 100000"),
        ({"ldm": '{"request": {"prompt": "x"}, "model_hash": "", "model": "a"}'}, "name its file by --model"),
        ({"ldm": '{"request": {"prompt": "x"}, "model_hash": ["a"], "model": 5}'}, "the picture's is not told"),
        ({"parameters": infotext("Model hash: 0123456789, Model: sd")}, 'the picture\'s is "sd" [0123456789], and'),
        ({"ldm": '{"request": {"prompt": "x", "refine_at": 0.5}}'}, "refiner: found none, .* give it by --refiner"),
        ({"ldm": '{"request": {"prompt": "\\ud800", "width": 64, "height": 64}}'}, "prompt: found "),
        ({"parameters": infotext("Model hash: zzz, Model: \x1b[2J")}, "\\u001b[2J"),
    ],
)
def test_hostile_pictures_are_refused_in_a_line(chunks, message, tiny_model, capsys):
    written("a.png", **chunks)
    assert main(["redo", "a.png"]) == 2
    err = capsys.readouterr().err
    assert re.search(message.replace("[", r"\["), err) if ".*" in message else message in err
    assert "\x1b" not in err and "Traceback" not in err
    assert [path.name for path in Path().iterdir()] == ["a.png"]


STEPS = ["--steps", "1"]

HOSTILE = {
    "markup": {"parameters": "<script>alert(1)</script>\x1b[2J\u202egnp\nSteps: 1, Sampler: \x07, Seed: 1"},
    "types": {"ldm": json.dumps({"request": {"prompt": {"\x1b": 1}, "steps": [[]]}, "notes": 5, "dtype": ["\x1b"]})},
    "lists": {"ldm": json.dumps({"request": {}, "adapters": [None, "\x1b", {"name": "\x1b"}], "parts": [[1]]})},
    "graph": {"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": {"seed": "\x1b", "cfg": ["1", 0]}}})},
    "numbers": {
        "ldm": '{"request": {"prompt": "x", "guidance": 1e999, "eta": NaN, "rescale": -Infinity}, "parts": [1e999]}'
    },
    "nothing": {},
}


@pytest.mark.parametrize("chunks", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_whatever_a_file_holds_is_shown_harmlessly(chunks, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written("a.png", **chunks)
    assert main(["show", "a.png", *more]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith('{"path"' if more else "a.png: PNG 64x64, ")
    assert not set(out) & set("\x1b\x07\u202e")
    assert not more or json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_what_redo_needs_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    control = {"network": "canny", "image_sha256": "0123456789abcdef"}
    request = {"prompt": "x", "refine_at": 0.8, "mask_sha256": None, "controls": [control], "guidance": None}
    written("a b.png", ldm=json.dumps({"request": request}))
    assert main(["show", "a b.png"]) == 0
    out = capsys.readouterr().out
    needs = "--mask FILE --control FILE --control-image FILE (SHA-256 0123456789ab...) --refiner FILE"
    assert f"redo       ldm redo 'a b.png' {needs}\n" in out and "guidance" not in out


def test_pillow_says_nothing_of_its_own(tmp_path):
    """Neither of broken EXIF nor of a size that is refused anyhow."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*" + b"\xff" * 4 + whole[2:])
    header = struct.pack(">IIBBBBB", 10000, 10000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", b"x"), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    found = subprocess.run(
        [sys.executable, "-c", "from ldm.apps.cli import main; main(['show', 'a.jpg']); main(['show', 'b.png'])"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert found.stdout == "a.jpg: JPEG 64x64, says nothing of how it was made\n"
    assert found.stderr.splitlines() == ["ldm: b.png: found 10000x10000 pixels, expected at most 67108864"]


def test_what_is_shown(tiny_model, capsys):
    assert main(["generate", "a red apple", "--negative", "blur\nfog", "--seed", "3", "-o", "a.png", *STEPS]) == 0
    capsys.readouterr()
    assert main(["show", "a.png"]) == 0
    out = capsys.readouterr().out
    for part in ("made by ldm", "prompt     a red apple\n", "negative   blur\n             fog\n", "steps 1, sampler",
                 f"model      {tiny_model.stem} [", "drawn in   ", "redo       ldm redo a.png\n"):  # fmt: skip
        assert part in out
    assert main(["show", "a.png", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["remake"]["fields"]["seed"] == 3 and shown["record"]["request"]["prompt"] == "a red apple"


def test_the_difference_of_two_pictures():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    other = grey.copy()
    other.putpixel((0, 0), (110, 100, 100))
    found = difference(grey, other)
    assert found is not None and (found.identical, found.largest) == (False, 10)
    assert found.mean == pytest.approx(10 / 192) and found.psnr == pytest.approx(10 * math.log10(255**2 / (100 / 192)))
    assert asdict(difference(grey, grey) or found) == {"identical": True, "mean": 0.0, "largest": 0, "psnr": None}
    assert difference(grey, grey.resize((4, 4))) is None


@pytest.mark.parametrize("told", [None, "", "0", "../x", "g" * 64, "0" * 65])
def test_what_is_no_hash_fits_no_file(told, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    assert same_file(tmp_path / "a", digest) and same_file(tmp_path / "a", digest[:10])
    assert not same_file(tmp_path / "a", told) and not same_file(tmp_path / "none", digest)


def test_showing_is_quick():
    """It needs no torch, whose import takes longer than all the rest."""
    code = "import sys, ldm.apps.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0

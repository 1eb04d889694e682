"""The command line: what it answers, what it writes, and how it says no."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import __version__
from ldm.apps.cli import main
from ldm.models.presets import SystemConfig, sd2, small, tiny
from ldm.pipeline.metadata import read_metadata

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_model(tiny_file: Callable[[SystemConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model as the one that is loaded by default, and an empty working folder."""
    path = tiny_file(tiny(small()))
    monkeypatch.setenv("LDM_MODEL", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def ldm(*arguments: str, cwd: Path, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a shell would."""
    command = [sys.executable, "-c", "import sys; from ldm.apps.cli import main; sys.exit(main())", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120, **options)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_line_from_a_prompt_to_a_picture(tiny_model, tmp_path, capsys):
    assert main(["generate", "a red apple", "--seed", "42", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a-red-apple-42.png  seed 42  ") and out.count("\n") == 1 and err == ""
    assert Image.open(tmp_path / "a-red-apple-42.png").size == (64, 64)
    found = read_metadata(tmp_path / "a-red-apple-42.png")
    assert found.record is not None and found.record["model"] == tiny_model.stem
    assert len(found.record["model_hash"]) == 64 and f"Model hash: {found.record['model_hash'][:10]}" in str(found)


def test_the_same_command_twice_keeps_both_and_they_are_equal(tiny_model, tmp_path):
    for _ in range(2):
        assert main(["generate", "x", "--seed", "1", "--steps", "2", "-o", "new/folder"]) == 0
    assert files(tmp_path / "new" / "folder") == ["x-1-2.png", "x-1.png"]
    first, second = (np.asarray(Image.open(tmp_path / "new/folder" / name)) for name in ("x-1.png", "x-1-2.png"))
    assert np.array_equal(first, second)


def test_many_prompts_many_seeds_and_json(tiny_model, tmp_path, capsys):
    Path("more.txt").write_text("\ufeffa pear\n\n  ein Käse \n", encoding="utf-8")
    arguments = ["generate", "a fig", "--prompt-file", "more.txt", "--count", "2", "--seed", "5", "--json"]
    assert main([*arguments, "--steps", "1", "--size", "72x64", "--sampler", "euler-a", "--eta", "0.5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        (prompt, seed) for prompt in ("a fig", "a pear", "ein Käse") for seed in (5, 6)
    ]
    assert [line["path"] for line in lines][-1] == "ein-käse-6.png"
    assert all((line["width"], line["height"], line["notes"]) == (72, 64, []) for line in lines)
    request = read_metadata("ein-käse-6.png").request()
    assert request is not None and (request.sampler, request.eta, request.width) == ("euler-a", 0.5, 72)


def test_a_named_file(tiny_model, tmp_path, capsys):
    assert main(["generate", "x", "--count", "2", "--steps", "1", "-o", "out.png"]) == 0
    assert files(tmp_path) == ["out-2.png", "out.png"]


def test_image_to_image(tiny_model, tmp_path, capsys):
    Image.effect_noise((96, 96), 80).convert("RGB").save("in.jpg")
    assert main(["img2img", "x", "--image", "in.jpg", "--strength", "0.5", "--steps", "4", "--seed", "0"]) == 0
    record = read_metadata("x-0.png").record
    assert record is not None and record["request"]["strength"] == 0.5 and "image_sha256" in record["request"]


def test_verbose_says_what_was_found_and_where_the_time_went(tiny_model, capsys):
    assert main(["generate", "x", "--steps", "1", "--verbose", "--device", "cpu", "--dtype", "float32"]) == 0
    err = capsys.readouterr().err
    assert "ldm: model: family: ldm" in err and "prediction: v" in err
    for part in ("imports", "loading", "text", "denoising", "decoding", "saving"):
        assert f"{part} " in err.splitlines()[-1]


def test_the_user_decides_what_the_network_predicts(tiny_model, capsys):
    assert main(["generate", "x", "--steps", "1", "--seed", "0", "--verbose", "--prediction", "eps"]) == 0
    assert "prediction: eps" in capsys.readouterr().err
    assert main(["generate", "x", "--steps", "1", "--seed", "0"]) == 0
    first, second = (np.asarray(Image.open(name)) for name in ("x-0.png", "x-0-2.png"))
    assert not np.array_equal(first, second)


def test_notes_are_said(tiny_model, capsys):
    assert main(["generate", "apple " * 90, "--steps", "1"]) == 0
    assert "ldm: note: prompt: its last 15 tokens do not fit" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "no command": ([], "Expected one of {generate, img2img, info, sheet, train}"),
    "unknown command": (["genrate"], "genrate; Available subcommands: generate, img2img"),
    "no prompt": (["generate"], 'prompt: found none, expected what to draw; try: ldm generate "a red apple"'),
    "unknown flag": (["generate", "x", "--sede", "3"], "--sede, 3; did you mean --seed?"),
    "unknown short flag": (["generate", "x", "-q"], "-q"),
    "missing value": (["generate", "x", "--seed"], "'--seed'"),
    "seed text": (["generate", "x", "--seed", "y"], "--seed: found 'y', expected a whole number"),
    "seed fraction": (["generate", "x", "--seed", "1.5"], "--seed: found '1.5', expected a whole number"),
    "seed 2^63": (["generate", "x", "--seed", str(2**63)], "seed: found 9223372036854775808, expected"),
    "seed -2": (["generate", "x", "--seed", "-2"], "seed: found -2, expected"),
    "eta text": (["generate", "x", "--eta", "y"], "--eta: found 'y', expected FLOAT"),
    "eta": (["generate", "x", "--eta", "0.5"], "eta: the sampler dpmpp-2m takes none"),
    "steps 0": (["generate", "x", "--steps", "0"], "steps: found 0, expected a whole number from 1 to 1000"),
    "steps 1e3": (["generate", "x", "--steps", "1e3"], "--steps: found '1e3', expected a whole number"),
    "size": (["generate", "x", "--size", "513x512"], "width: found 513, .*; the nearest is 512"),
    "size 0": (["generate", "x", "--size", "0"], "width: found 0, expected"),
    "size text": (["generate", "x", "--size", "wide"], 'size: found "wide", expected WIDTHxHEIGHT, as 128x128'),
    "size three": (["generate", "x", "--size", "64x64x64"], "size: found"),
    "size minus": (["generate", "x", "--size", "-8x64"], "size: found"),
    "size huge": (["generate", "x", "--size", "9" * 5000], "size: found"),
    "pixels": (["generate", "x", "--size", "2048"], "width x height: found 2048x2048, expected at most 3145728"),
    "guidance nan": (["generate", "x", "--guidance", "nan"], "guidance: found nan, expected a number from 0 to 50"),
    "guidance inf": (["generate", "x", "--guidance", "1e999"], "guidance: found inf, expected"),
    "guidance text": (["generate", "x", "--guidance", "much"], "--guidance: found 'much', expected a number"),
    "count 0": (["generate", "x", "--count", "0"], "count: found 0, expected"),
    "count": (["generate", "x", "--count", "1000000"], "count: found 1000000, expected"),
    "sampler": (["generate", "x", "--sampler", "eulr"], 'sampler: found "eulr", .*; did you mean euler?'),
    "schedule": (["generate", "x", "--schedule", "none"], 'schedule: found "none", expected one of karras'),
    "dtype": (["generate", "x", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
    "device": (["generate", "x", "--device", "cuda:9"], "device cuda:9: "),
    "no device": (["generate", "x", "--device", "toaster"], "device toaster: not known"),
    "long prompt": (["generate", "x" * 4001], "prompt: found 4001 characters, expected a text of at most 4000"),
    "prompt file": (["generate", "--prompt-file", "none.txt"], "none.txt: cannot be read (no such file or directory)"),
    "binary prompts": (["generate", "--prompt-file", "binary"], "binary: is not UTF-8 text, expected a prompt on each"),
    "empty prompts": (["generate", "--prompt-file", "empty"], "prompt: found none"),
    "prompt folder": (["generate", "--prompt-file", "folder"], "folder: found a folder, expected a file"),
    "output -": (["generate", "x", "-o", "-"], "output: found -"),
    "output jpg": (["generate", "x", "-o", "a.jpg"], "a.jpg: expected a name that ends in .png, or a folder"),
    "output file": (["generate", "x", "-o", "empty"], "empty: expected a name that ends in .png, or a folder"),
    "output below a file": (["generate", "x", "-o", "empty/a.png"], "empty: is not a folder"),
    "no model": (["generate", "x", "--model", "none.safetensors"], "none.safetensors: "),
    "wrong model": (["generate", "x", "--model", "binary"], "binary: "),
    "no image": (["img2img", "x"], "--image FILE"),
    "missing image": (["img2img", "x", "--image", "none.png"], "none.png: cannot be read"),
    "wrong image": (["img2img", "x", "--image", "binary"], "image: found another kind of file"),
    "strength": (["img2img", "x", "--image", "in.png", "--strength", "0.01"], "strength: 0.01 of 24 steps is less"),
    "strength 2": (["img2img", "x", "--image", "in.png", "--strength", "2"], "strength: found 2.0, expected"),
    "sheet columns": (["sheet", "--columns", "0"], "columns: found 0, expected 1 or more"),
    "sheet prompts": (["sheet", "--prompts", "binary"], "binary: is not JSON, expected a list of prompts"),
    "sheet no prompts": (["sheet", "--prompts", "list.json"], "list.json: expected a list of 1 to 400 texts"),
    "sheet output": (["sheet", "-o", "folder"], "folder: expected a name that ends in .png"),
    "no recipe": (["train"], "RECIPE"),
    "terminal codes": (["generate", "x", "--sampler", "\x1b[31m"], "sampler: found"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_with_nothing_written(arguments, message, tiny_model, tmp_path, capsys):
    Path("binary").write_bytes(b"\xff\xfe\x00\x01" * 10)
    Path("empty").touch()
    Path("folder").mkdir()
    Path("list.json").write_text('[{"text": "x"}]')
    Image.new("RGB", (64, 64)).save("in.png")
    before = files(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ldm: ") and err.count("\n") == 1 and "\x1b" not in err and len(err) < 1000
    pieces = message.split(".*")
    assert all(piece in err for piece in pieces), err
    assert files(tmp_path) == before


def test_a_model_that_cannot_draw_from_text(tiny_model, tiny_file, tmp_path, capsys):
    path = tiny_file(tiny(sd2(in_channels=5)))
    assert main(["generate", "x", "--model", str(path)]) == 2
    assert f"ldm: {path}: its U-Net takes 1 extra channels" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_a_full_disk_loses_nothing_that_was_there(tiny_model, tmp_path, capsys, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["generate", "x", "--steps", "1", "--seed", "3"]) == 2
    assert "x-3.png: cannot be written (no space left on device)" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_ctrl_c_while_drawing(tiny_model, tmp_path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.pipeline.sample.to_image", interrupt)
    assert main(["generate", "x", "--steps", "1"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "ldm: interrupted\n") and files(tmp_path) == []


def test_ctrl_c_between_two_pictures_keeps_the_first(tiny_model, tmp_path, capsys, monkeypatch):
    from ldm.pipeline import sample

    drawn: list[object] = []

    def interrupt_the_second(pixels: object) -> Image.Image:
        drawn.append(pixels)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(sample, "to_image", interrupt_the_second)
    assert main(["generate", "x", "--steps", "1", "--count", "2", "--seed", "8"]) == 130
    assert capsys.readouterr().out.startswith("x-8.png") and files(tmp_path) == ["x-8.png"]


def test_the_reader_of_our_output_leaves(tiny_model, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["generate", "x", "--steps", "1"]) == 141
    sys.stdout.close()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ldm {__version__}\n"


@pytest.mark.parametrize("command", ["generate", "img2img", "info", "sheet", "train"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"usage: ldm {command}" in capsys.readouterr().out


def test_help_is_quick_and_needs_neither_home_nor_terminal(tmp_path):
    """In a process of its own: no HOME, a plain locale, files in the way, and no torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    env = {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
    ldm("--help", cwd=tmp_path, env=env)  # once, to warm the disk
    begun = time.perf_counter()
    answer = ldm("--help", cwd=tmp_path, env=env)
    assert answer.returncode == 0 and "generate" in answer.stdout and answer.stderr == ""
    assert time.perf_counter() - begun < 5  # well under 1 s on an idle machine
    code = "import sys; from ldm.apps.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'transformers', 'open_clip') if m in sys.modules])"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert imported.stdout.splitlines()[-1] == b"[]"


def test_a_picture_from_a_poor_environment(tiny_model, tmp_path):
    """`python -m`, no HOME, an ASCII locale, stdout closed, a torch.py where we stand: still a picture."""
    work = tmp_path / "wörk"
    work.mkdir()
    (work / "torch.py").write_text("raise SystemExit('the wrong torch')")
    script = f'exec "{sys.executable}" -m ldm generate "épée" --steps 1 --seed 1 >&-'
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "LC_ALL": "C", "LDM_MODEL": str(tiny_model)}
    answer = subprocess.run(["sh", "-c", script], cwd=work, env=env, capture_output=True, timeout=120)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, b"", b"")
    assert files(work) == ["torch.py", "épée-1.png"]


def test_a_wrong_flag_in_a_process_of_its_own(tmp_path):
    answer = ldm("generate", "x", "--stepz", "3", cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "ldm: Unrecognized options: --stepz, 3; did you mean --steps?\n"

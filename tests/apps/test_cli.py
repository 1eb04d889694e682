"""The command line: what it answers, what it writes, and how it says no."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from ldm import __version__
from ldm.apps.cli import main
from ldm.apps.generate import hash_in_background
from ldm.models.presets import SystemConfig, sd1, sd2, small, tiny
from ldm.pipeline.metadata.read import read_metadata

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


def test_the_attention_kernel_is_chosen_for_the_command_alone(tiny_model, monkeypatch):
    used = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "ldm.layers.cpu_products.attend_in_blocks", lambda q, k, v: used.append("blocks") or fused(q, k, v)
    )
    plain = ["generate", "a red apple", "--steps", "1", "--dtype", "bfloat16"]
    assert main([*plain, "--attention", "sdpa"]) == 0
    assert not used
    assert main(plain) == 0
    assert used


def test_xformers_is_refused_without_it_and_on_a_cpu(tiny_model, tmp_path, capsys, monkeypatch):
    arguments = ["generate", "a red apple", "--attention", "xformers", "--device", "cpu"]
    for spec, message in ((None, "pip install xformers"), (object(), "needs a CUDA GPU, and the model is on cpu")):
        monkeypatch.setattr("ldm.layers.attention.find_spec", lambda name, spec=spec: spec)
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not files(tmp_path)


def test_a_command_compiles_and_its_pictures_say_so(tiny_model, tmp_path, capsys, monkeypatch):
    arguments = ["generate", "a red apple", "--steps", "1", "--seed", "1", "--compile", "--device", "cpu"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(arguments) == 2
    assert "compile: the C++ compiler no-such-compiler was not found; install it" in capsys.readouterr().err
    assert not files(tmp_path)
    monkeypatch.setenv("CXX", sys.executable)
    seen = []
    monkeypatch.setattr("ldm.models.compiled.BlockCompiler.compiled", lambda _self, net: seen.append(net) or net)
    assert main(arguments) == 0
    assert len(seen) == 1 and "compiling: the first step takes longer" in capsys.readouterr().err
    (path,) = files(tmp_path)
    found = read_metadata(tmp_path / path)
    assert found.record is not None and found.record["compiled"] is True


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


def test_a_model_in_parts_found_by_name(tiny_file, tmp_path, monkeypatch, capsys):
    """A file cut in two pickles: the picture is the same."""
    monkeypatch.chdir(tmp_path)
    tensors = load_file(tiny_file(tiny(sd1())))
    save_file(tensors, "whole.safetensors")
    shared = ["generate", "x", "--steps", "1", "--seed", "0"]
    assert main([*shared, "--model", "whole.safetensors", "-o", "whole.png"]) == 0
    for folder, own in (("checkpoints", False), ("vae", True)):
        (tmp_path / "comfy/models" / folder).mkdir(parents=True)
        part = {name: t for name, t in tensors.items() if name.startswith("first_stage_model.") == own}
        torch.save(part, tmp_path / "comfy/models" / folder / "Mine.ckpt")
    command = [*shared, "-o", "parts.png", "--models", "comfy", "--model", "mine"]
    assert main([*command, "--vae", "mine"]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 2
    assert "--vae FILE" in capsys.readouterr().err
    assert main([*command, "--allow-pickle", "--vae", "mine"]) == 0
    assert Image.open("parts.png").tobytes() == Image.open("whole.png").tobytes()


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


def test_notes_are_said(tiny_model, tiny_file, capsys):
    assert main(["generate", "x", "--steps", "1", "--size", "64", "--model", str(tiny_file(tiny(sd1(9))))]) == 0
    assert "ldm: note: this is an inpainting model: all of the picture is masked" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "no command": ([], "Expected one of {generate, img2img, inpaint, outpaint, upscale, variations, depth2img,"),
    "unknown command": (["genrate"], "genrate; Available subcommands: generate, img2img"),
    "no prompt": (["generate"], 'prompt: found none, expected what to draw; try: ldm generate "a red apple"'),
    "unknown flag": (["generate", "x", "--sede", "3"], "--sede, 3; did you mean --seed?"),
    "nearly a flag": (["generate", "x", "--step", "3"], "--step, 3; did you mean --steps?"),
    "its own help": (["generate", "x", "--seed"], "see ldm generate --help"),
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
    "output gif": (["generate", "x", "-o", "a.gif"], "a.gif: expected a name that ends in .png, .jpg or .webp, or a f"),
    "output file": (["generate", "x", "-o", "empty"], "empty: expected a name that ends in .png, .jpg or .webp, "),
    "output below a file": (["generate", "x", "-o", "empty/a.png"], "empty: is not a folder"),
    "output long": (["generate", "x", "-o", "x" * 300], "cannot be written (file name too long); choose another"),
    "output long png": (["generate", "x", "-o", "x" * 300 + ".png"], "cannot be written (file name too long)"),
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


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="a POSIX system's rights")
def test_an_output_where_we_may_not_look(tiny_model, tmp_path, capsys):
    main(["generate", "x", "-o", "-"])  # to import as ourselves
    capsys.readouterr()
    tmp_path.chmod(0o711)
    Path("locked").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # who may look everywhere
        os.seteuid(65534)
    try:
        assert main(["generate", "x", "-o", "locked/a.png"]) == 2
    finally:
        os.seteuid(user)
        Path("locked").chmod(0o700)
    assert capsys.readouterr() == (
        "",
        "ldm: locked/a.png: cannot be written (permission denied); choose another output\n",
    )


UNET_BIAS = "model.diffusion_model.out.2.bias"


def edited(good: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    """A model's file after a change to its tensors."""
    tensors = load_file(good)
    change(tensors)
    with safe_open(good, "pt") as file:
        return save(tensors, file.metadata())


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda good: b"", "empty file"),
    "html": (lambda good: b"<!DOCTYPE html><html>", "HTML"),
    "truncated": (lambda good: good.read_bytes()[:-100], "incomplete"),
    "pickle": (lambda good: pickle.dumps({"state_dict": {}}), "pickle"),
    "missing": (lambda good: edited(good, lambda t: t.pop(UNET_BIAS)), "do not fit"),
    "misshapen": (lambda good: edited(good, lambda t: t.update({UNET_BIAS: torch.ones(7)})), "do not fit"),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_models_are_refused_in_one_line(make, message, tiny_model, tmp_path, capsys):
    Path("bad.safetensors").write_bytes(make(tiny_model))
    for command in (["info", "bad.safetensors"], ["generate", "x", "--model", "bad.safetensors"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("ldm: bad.safetensors: ") and err.count("\n") == 1 and message in err
    assert files(tmp_path) == ["bad.safetensors"]


def test_a_folder_is_no_model(tiny_model, tmp_path, capsys):
    for command, message in (
        (["info", "."], "holds no model files"),
        (["generate", "x", "--model", "."], "is a folder"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert files(tmp_path) == []


def test_info_of_a_good_and_of_a_damaged_file(tiny_model, capsys):
    assert main(["info", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    assert "checkpoint" in out and "U-Net" in out and "PROBLEM" not in out and err == ""
    assert main(["info", str(tiny_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["system"]["family"] == "ldm"
    Path("nan").write_bytes(edited(tiny_model, lambda t: t[UNET_BIAS].fill_(torch.nan)))
    assert main(["info", "nan"]) == 0
    capsys.readouterr()
    assert main(["info", "nan", "--deep"]) == 2
    out, err = capsys.readouterr()
    assert "PROBLEM" in out and UNET_BIAS in out
    assert err == "ldm: nan: 1 of its tensors hold numbers that are not finite\n"


GAVE_UP = {
    "gpu full": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        "no memory left (CUDA out",
    ),
    "machine full": (MemoryError(), "no memory left (MemoryError)"),
    "gpu lost": (
        RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"),
        "the GPU failed (CUDA error",
    ),
}


@pytest.mark.parametrize(("error", "message"), GAVE_UP.values(), ids=GAVE_UP)
def test_a_machine_that_gives_up(error, message, tiny_model, tmp_path, capsys, monkeypatch):
    def give_up(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ldm.pipeline.load.load", give_up)
    assert main(["generate", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ldm: {message}") and err.count("\n") == 1 and files(tmp_path) == []


def test_a_bug_is_not_taken_for_it(tiny_model, monkeypatch):
    def bug(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("ldm.pipeline.load.load", bug)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["generate", "x"])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hash_that_fails_is_not_waited_for(tiny_model, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hashlib.file_digest", fail)
    with pytest.raises(MemoryError):
        hash_in_background(tiny_model).result(timeout=60)


def test_training_without_its_packages(tmp_path):
    code = "import sys; sys.modules['accelerate'] = None; from ldm.apps.cli import main; sys.exit(main(['train', 'x']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert answer.returncode == 2
    assert answer.stderr == "ldm: train: the package accelerate is not installed; pip install -e '.[train]'\n"


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


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "img2img",
        "inpaint",
        "outpaint",
        "upscale",
        "variations",
        "depth2img",
        "interpolate",
        "textdiff",
        "pca",
        "grid",
        "show",
        "redo",
        "info",
        "convert",
        "sheet",
        "check",
        "train",
        "train-clip",
        "index",
        "search",
        "classify",
        "score",
    ],
)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"usage: ldm {command}" in capsys.readouterr().out


def test_help_is_quick_and_needs_neither_home_nor_terminal(tmp_path):
    """In a process of its own: no HOME, a plain locale, files in the way, and no torch."""
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    env = {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
    helped, imported_torch = [], []
    for _ in range(3):  # in turns, so that both have the machine as it is; the first round warms the disk
        begun = time.perf_counter()
        answer = ldm("--help", cwd=tmp_path, env=env)
        helped.append(time.perf_counter() - begun)
        assert answer.returncode == 0 and "generate" in answer.stdout and answer.stderr == ""
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], cwd=ROOT, check=True)
        imported_torch.append(time.perf_counter() - begun)
    assert min(helped) < 0.7 * min(imported_torch)
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


def test_the_bar_on_a_terminal(tiny_model, tmp_path):
    pty = pytest.importorskip("pty", reason="a POSIX system's terminals")
    ours, theirs = pty.openpty()
    code = "import sys; from ldm.apps.cli import main; sys.exit(main())"
    arguments = ["generate", "a [red] apple", "--steps", "3", "--count", "2", "--seed", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    text = shown.decode()
    assert process.wait(timeout=120) == 0 and "Traceback" not in text
    assert "loading" in text and "a [red] apple  step 3/3" in text and "100%" in text
    for name in ("a-red-apple-1.png", "a-red-apple-2.png"):
        assert f"{name}  seed " in text and (tmp_path / name).exists()


def test_a_wrong_flag_in_a_process_of_its_own(tmp_path):
    answer = ldm("generate", "x", "--stepz", "3", cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "ldm: Unrecognized options: --stepz, 3; did you mean --steps?\n"

"""`ldm tune` as it is typed: from a folder to a file and a page, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.apps.cli import main
from ldm.errors import LdmError
from ldm.models.presets import sd1, small, tiny

COLORS = ("red", "green", "blue", "white")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = tmp_path / "my pictures"
    where.mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (64, 64), color).save(where / f"{number}.png")
        (where / f"{number}.txt").write_text(f"a {color} <b>square</b>")
    return where


@pytest.fixture
def base(tiny_file) -> str:
    return str(tiny_file(tiny(small())))


SHORT = ("--steps", "2", "--looks", "1", "--batch", "2", "--precision", "no", "--device", "cpu")
SMALL = (*SHORT, "--rank", "2")


def test_a_lora_from_a_folder_and_again_to_go_on(folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["tune", str(folder), "--base", base, "-o", str(output), *SMALL, "--json"]
    assert main([*arguments, "--plan"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["pictures"] == 3 and planned["held_out"] == 1 and planned["buckets"] == {"64x64": 3}
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert Path(told["file"]) == output / "out.safetensors" and Path(told["file"]).is_file()
    page = (output / "report.html").read_text()
    assert "&lt;b&gt;square" in page and "<b>square" not in page
    before = Path(told["file"]).read_bytes()
    assert main(arguments) == 0  # it is finished: nothing is trained, and the verdict is the same
    again = json.loads(capsys.readouterr().out)
    assert again["outcome"] == told["outcome"] and Path(told["file"]).read_bytes() == before
    assert main(["info", told["file"], "--json"]) == 0
    assert "lora" in capsys.readouterr().out.lower()
    picture = tmp_path / "p.png"
    drawn = ["generate", "a red square", "--model", base, "--lora", told["file"], "-o", str(picture), "--steps", "1"]
    assert main(drawn) == 0 and picture.exists()


def test_a_failed_check_for_copies_is_told_in_json_too(folder, base, tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise LdmError("the file is gone")

    monkeypatch.setattr("ldm.training.tune.finish.tuned_model", fail)
    assert main(["tune", str(folder), "--base", base, "-o", str(tmp_path / "out"), *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["copies"] is None and told["outcome"]
    assert told["notes"] == ["Whether samples are copies could not be looked at: the file is gone"]


def test_dreambooth_draws_its_class_itself(folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["tune", str(folder), "--base", base, "-o", str(output), "--method", "dreambooth"]
    assert main([*arguments, "--class-caption", "a square", *SMALL, "--plan"]) == 0
    assert len(list((output / "class").glob("*.png"))) == 2 * len(COLORS)
    assert f"{2 * len(COLORS)} of the class" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "batch: found 0"),
        (["--steps", "0"], "steps: found 0"),
        (["--rate", "nan"], "rate: found nan"),
        (["--ema", "1"], "ema: found 1"),
        (["--rank", "0"], "rank is 0"),
        (["--rank", "4096"], "rank is 4096"),
        (["--held-out", "1"], "held out: found 1"),
        (["--size", "65"], "size: found 65"),
        (["--drop", "2"], "drop is 2"),
        (["--method", "embedding", "--like", "  "], "begins as '  '"),
        (["--method", "controlnet"], "hints: no picture has one"),
        (["--method", "controlnet", "--text"], "text: the text towers are not trained by controlnet"),
        (["--whole"], "whole: found with method lora, expected dreambooth"),
        (["--looks", "0"], "looks: found 0"),
        (["--save-every", "0"], "save-every: found 0"),
        (["--min-snr", "-1"], "min-snr: found -1"),
        (["--min-snr", "inf"], "min-snr: found inf"),
        (["--prior-weight", "-0.5", "--class-pictures", "."], "prior weight: found -0.5"),
        (["--prior-weight", "0.5"], "prior-weight: found without pictures of the class"),
        (["--offset", "-0.1"], "offset: found -0.1"),
        (["--offset", "nan"], "offset: found nan"),
        (["--perturbation", "-0.1"], "perturbation: found -0.1"),
        (["--perturbation", "inf"], "perturbation: found inf"),
        (["--huber", "0"], "huber: found 0"),
        (["--huber", "nan"], "huber: found nan"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--dropout", "nan"], "dropout is nan"),
        (["--drop", "nan"], "drop is nan"),
        (["--held-out", "nan"], "held out: found nan"),
        (["--warmup", "-1"], "warmup: found -1"),
        (["--workers", "-1"], "workers: found -1"),
        (["--seed", str(2**63)], "seed: found"),
        (["--repeats", "0"], "repeats: found 0"),
        (["--layout", "diffusers", "--kind", "loha"], "layout: diffusers has no form for loha"),
        (["--layout", "diffusers", "--kind", "lokr"], "layout: diffusers has no form for lokr"),
        (["--precision", "fp16"], "fp16, which needs a GPU"),
        (["--method", "embedding", "--like", "a", "--word", "../x"], "word: found '../x'"),
        (["--method", "embedding", "--like", "a", "--vectors", "0"], "has 0 vectors"),
        (["--text-rank", "2"], "text-rank: found with method lora, expected --text beside it"),
        (["--text-rate", "1"], "text-rate: found with method lora, expected --text beside it"),
        (["--text", "--text-rate", "nan"], "text-rate: found nan"),
        (["--text", "--text-rate", "1e-4", "--rate", "0"], "rate: found 0 beside a text-rate"),
        (["--text", "--text-rate", "1", "--optimizer", "prodigy"], "text-rate: found with method lora, expected anoth"),
        (["--word", "dog"], "word: found with method lora, expected --method embedding"),
        (["--like", "dog"], "like: found with method lora, expected --method embedding"),
        (["--vectors", "2"], "vectors: found with method lora, expected --method embedding"),
        (["--method", "full", "--kind", "loha"], "kind: found with method full, expected a LoRA"),
        (["--shard"], "shard: found with method lora, expected --method full, or dreambooth with --whole"),
        (["--method", "full", "--shard", "--optimizer", "muon"], "shard: found with method full, expected --optimizer"),
        (["--method", "full", "--shard"], "shard: found one process, expected several; start it as torchrun"),
        (["--method", "full", "--rank", "2"], "rank: found with method full, expected a LoRA"),
        (["--method", "dreambooth", "--whole", "--rank", "2"], "rank: found with method dreambooth, expected a LoRA"),
        (["--method", "embedding", "--like", "a", "--conv-rank", "2"], "conv-rank: found with method embedding"),
        (["--method", "full", "--layout", "diffusers"], "layout: found with method full"),
        (["--canny"], "canny: found with method lora, expected --method controlnet"),
        (["--hints", "."], "hints: found with method lora, expected --method controlnet"),
        (
            ["--method", "controlnet", "--hints", ".", "--canny"],
            "hints: found with method controlnet, expected no --ca",
        ),
        (["--class-caption", "a dog"], "class-caption: found with method lora, expected --method dreambooth"),
        (["--keep", "1"], "keep: found with method lora, expected --shuffle or --drop-tags"),
        (["--optimizer", "schedulefree", "--ema", "0.9"], "ema: found with method lora, expected another --optimizer"),
        (["--optimizer", "schedulefree", "--schedule", "cosine"], "schedule: found with method lora, expected another"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, words, folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["tune", str(folder), "--base", base, "-o", str(output), *SHORT, *arguments]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if words in one]
    assert line.startswith("ldm: ")
    assert not list(output.rglob("*.safetensors"))  # nothing is written, and nothing encoded


def test_what_the_model_cannot_is_told_before_pictures_are_encoded(folder, tiny_file, tmp_path, capsys):
    output, arguments = tmp_path / "out", ["--method", "dreambooth", "--class-caption", "a square"]
    of_noise = ["tune", str(folder), "--base", str(tiny_file(tiny(sd1()))), "-o", str(output), *SHORT, *arguments]
    assert main([*of_noise, "--zero-terminal-snr"]) == 2
    assert "zero-terminal-snr: this model predicts the noise" in capsys.readouterr().err
    assert not output.exists()


def test_a_run_of_other_settings_is_not_gone_on_with(folder, base, tmp_path, capsys):
    arguments = ["tune", str(folder), "--base", base, "-o", str(tmp_path / "out"), *SMALL]
    assert main(arguments) == 0
    assert main([*arguments, "--rank", "3", "--steps", "4"]) == 2
    assert "was begun with adapter" in capsys.readouterr().err
    (folder / "0.txt").write_text("something else")
    assert main([*arguments, "--steps", "4"]) == 2
    assert "was begun with pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("peft", []),
        ("peft", ["--method", "dreambooth"]),
        ("jinja2", ["--method", "full"]),
        ("matplotlib", []),
        ("torchao", ["--optimizer", "adamw8bit"]),
        ("transformers", ["--optimizer", "adafactor"]),
        ("prodigyopt", ["--optimizer", "prodigy"]),
        ("schedulefree", ["--optimizer", "schedulefree"]),
    ],
)
def test_a_missing_package_is_told_at_once(package, arguments, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "out"
    assert main(["tune", str(folder), "--base", "nowhere.safetensors", "-o", str(output), *SHORT, *arguments]) == 2
    said = capsys.readouterr().err
    assert said == f"ldm: tune: needs {package}, a package that is not installed; pip install 'ldm[tune]'\n"
    assert not output.exists()


def test_packages_that_are_not_needed_are_not_asked_for(tmp_path, monkeypatch, capsys):
    for package in ("peft", "torchao", "prodigyopt", "schedulefree"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["tune", str(tmp_path), "--method", "full"]) == 2
    assert "holds no pictures" in capsys.readouterr().err


def test_an_empty_folder_is_told_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["tune", str(tmp_path / "empty"), "--base", "nowhere.safetensors"]) == 2
    assert "holds no pictures" in capsys.readouterr().err

"""`ldm tune` as it is typed: from a folder to a file and a page, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.apps.cli import main
from ldm.models.presets import small, tiny

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


SHORT = ("--steps", "2", "--looks", "1", "--batch", "2", "--rank", "2", "--precision", "no", "--device", "cpu")


def test_a_lora_from_a_folder_and_again_to_go_on(folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["tune", str(folder), "--base", base, "-o", str(output), *SHORT, "--json"]
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


def test_dreambooth_draws_its_class_itself(folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["tune", str(folder), "--base", base, "-o", str(output), "--method", "dreambooth"]
    assert main([*arguments, "--class-caption", "a square", *SHORT, "--plan"]) == 0
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
        (["--method", "embedding", "--like", ""], "begins as ''"),
        (["--method", "controlnet"], "no picture is left"),
        (["--method", "controlnet", "--text"], "text: the text towers are not trained by controlnet"),
        (["--whole"], "whole: found with lora"),
        (["--looks", "0"], "looks: found 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, words, folder, base, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["tune", str(folder), "--base", base, "-o", str(output), *SHORT, *arguments]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if words in one]
    assert line.startswith("ldm: ")
    assert not list(output.glob("*.safetensors")) and not list(output.glob("step-*"))


def test_a_run_of_other_settings_is_not_gone_on_with(folder, base, tmp_path, capsys):
    arguments = ["tune", str(folder), "--base", base, "-o", str(tmp_path / "out"), *SHORT]
    assert main(arguments) == 0
    assert main([*arguments, "--rank", "3", "--steps", "4"]) == 2
    assert "was begun with adapter" in capsys.readouterr().err
    (folder / "0.txt").write_text("something else")
    assert main([*arguments, "--steps", "4"]) == 2
    assert "was begun with pictures" in capsys.readouterr().err


def test_an_empty_folder_is_told_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["tune", str(tmp_path / "empty"), "--base", "nowhere.safetensors"]) == 2
    assert "holds no pictures" in capsys.readouterr().err

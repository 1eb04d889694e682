"""`ldm index` and `ldm search` as commands: what they print, draw, refuse; and several processes on one index."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from together import run_together

import ldm.apps.flags.clip_inputs
from ldm.apps.cli import main

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "search"))

from fake_clip import draw, fake_clip, gallery  # noqa: E402

RANK = """
import sys
sys.path[:0] = sys.argv[2:]
import ldm.apps.flags.clip_inputs
from ldm.apps.cli import main
from fake_clip import fake_clip
ldm.apps.flags.clip_inputs.load_clip = lambda *_, **__: fake_clip()
sys.exit(main(["index", sys.argv[1], "--json"]))
"""


@pytest.fixture(autouse=True)
def clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm.apps.flags.clip_inputs, "load_clip", lambda *_, **__: fake_clip())


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Twelve pictures, a red, a green and a blue one, and an index of them."""
    folder = gallery(tmp_path / "pictures", 12)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (20, 10), colour).save(folder / f"{colour}.png")
    assert main(["index", str(folder)]) == 0
    capsys.readouterr()
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["search", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [result["rank"] for result in told["results"]] == [*range(1, len(told["results"]) + 1)]
    return [Path(result["path"]).name for result in told["results"]]


def test_what_indexing_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gallery(tmp_path / "pictures", 12)
    (folder / "bad.png").write_bytes(b"<html>")
    assert main(["index", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder}/.ldm-index  12 pictures: 12 added, 0 changed, 0 removed; 12 embedded, ")
    assert err.startswith("ldm: 1 could not be read, as bad.png: found a web page")
    assert err.endswith(f"{folder}/.ldm-index/report.json names them all\n") and err.count("\n") == 1
    draw(folder / "picture-0001.webp", 99)
    assert main(["index", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["changed"], told["embedded"], told["pictures"], told["nearest"]["kind"]) == (1, 1, 12, "exact")
    assert [bad["path"] for bad in told["bad"]] == ["bad.png"]


def test_shards_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, index = gallery(tmp_path / "pictures", 12), tmp_path / "index"
    for shard in ("1/2", "2/2"):
        assert main(["index", str(folder), "--index", str(index), "--shard", shard]) == 0
    assert "share 2 of 2: " in capsys.readouterr().out
    assert main(["search", "red", "--index", str(index)]) == 2
    assert "is not finished" in capsys.readouterr().err
    assert main(["index", str(folder), "--index", str(index)]) == 0
    assert "12 pictures: 12 added, 0 changed, 0 removed; 0 embedded" in capsys.readouterr().out


def test_words_pictures_and_sums(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--index", str(folder)]
    assert found(capsys, "red", *at, "--top", "1") == ["red.png"]
    assert found(capsys, "--image", str(folder / "blue.png"), *at, "--top", "1") == ["blue.png"]
    assert found(capsys, "red", "red", "blue", *at, "--top", "1") == ["red.png"]
    less = ["--image", str(folder / "red.png"), "--plus", "green", "--plus", "green", "--minus", "red"]
    assert found(capsys, *less, *at, "--top", "1") == ["green.png"]
    assert set(found(capsys, "green", *at, "--top", "99")) == {
        p.name for p in folder.rglob("*.*") if ".ldm" not in str(p)
    }


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "red", "--index", str(folder / ".ldm-index"), "--top", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == f" 1  1.0000  {folder}/red.png" and lines[9].startswith("10  ")
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_the_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "blue.png").unlink()
    sheet = tmp_path / "sheet.png"
    for expected in (sheet, tmp_path / "sheet-2.png"):
        assert main(["search", "blue", "--index", str(folder), "--top", "2", "-o", str(sheet)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{expected}  2 pictures"
    with Image.open(sheet) as image:
        assert image.size[0] == 2 * (128 + 4) + 4
        assert image.getpixel((30, 100)) == (200, 200, 200), "a grey tile stands for what is gone"
    with Image.open(sheet) as image:
        row = image.crop((136, 4, 264, 132)).resize((1, 1))
    assert row.getpixel((0, 0)) != (255, 255, 255)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search"], "found nothing to look for, expected words or --image FILE"),
        (["search", "--minus", "red"], "found nothing to look for"),
        (["search", ""], "found an empty text"),
        (["search", "x" * 1001], "more than 1000 characters"),
        (["search", "red", "--minus", "red"], "its parts cancel out"),
        (["search", "red", "--top", "0"], "top: found 0"),
        (["search", "red", "-o", "sheet.jpg"], "sheet.jpg: expected a name that ends in .png"),
        (["search", "red", "-o", "a/b.png", "--top", "1001"], "top: found 1001 with a sheet"),
        (["search", "--image", "nowhere.png"], "nowhere.png: cannot be read"),
        (["search", "--image", "setup.cfg"], "setup.cfg: found another kind of file"),
        (["search", "red", "--index", "nowhere"], "nowhere: holds no index; make one: ldm index FOLDER"),
        (["index", "nowhere"], "nowhere: is no folder"),
        (["index", ".", "--shard", "3/2"], "shard: found '3/2', expected one as 2/8"),
        (["index", ".", "--shard", "1/2", "--rebuild"], "rebuild: found --shard too"),
    ],
)
def test_bad_arguments(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    at = ["--index", str(folder)] if arguments[0] == "search" and "--index" not in arguments else []
    assert main([*arguments, *at]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_bad_top_is_told_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.apps.flags.clip_inputs, "load_clip", None)
    for top in ("0", "10001"):
        assert main(["search", "red", "--index", str(folder), "--top", top]) == 2
        assert f"top: found {top}, expected 1 to 10000" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("RANK", "-1")])
def test_what_no_launcher_says(
    name: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert main(["index", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{name}: found {value!r} in the environment, expected a launcher's number" in err
    assert err.count("\n") == 1


def test_another_model(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = fake_clip("b" * 64, name="other")
    monkeypatch.setattr(ldm.apps.flags.clip_inputs, "load_clip", lambda *_, **__: other)
    for arguments in (["search", "red", "--index", str(folder)], ["index", str(folder)]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "made with fake (aaaaaaaaaaaa" in err and "found other (bbbbbbbbbbbb" in err and err.count("\n") == 1
    assert main(["index", str(folder), "--rebuild"]) == 0


def test_the_english_hint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "красный", "--index", str(folder)]) == 0
    assert "fake reads English only" in capsys.readouterr().err


def test_ranks_of_a_launcher(tmp_path: Path) -> None:
    """Two processes with what a launcher tells them: each embeds its share, the first makes one index."""
    folder = gallery(tmp_path / "pictures", 30)
    first, second = run_together("-c", RANK, str(folder), str(ROOT), str(ROOT / "tests" / "search"))
    report = json.loads(first)
    assert 0 < report["embedded"] < report["pictures"] == 30
    assert second == ""

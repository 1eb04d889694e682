"""`ldm check`: what the terminal, JSON and the page say."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.apps.cli import main
from ldm.apps.output.check_page import crop_shares
from ldm.data.buckets import usual_buckets


def save(path: Path, seed: int, width: int = 80, height: int = 64, caption: str | None = "a thing") -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(levels).resize((width, height)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    save(root / "one.png", 1, caption='<script>alert("x")</script> & \x1b[31m')
    save(root / "two.png", 2, width=64, caption="word " * 80)
    save(root / "long.png", 3, width=900, height=30)
    save(root / "bare.png", 4, caption=None)
    (root / "broken.png").write_bytes(b"\x89PNG")
    (root / "broken.txt").write_text("x")
    return root


class Shown(HTMLParser):
    """What a browser would show and load of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(folder), "--size", "64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "3 can be used; 2 files left out", "of 2 to 80 tokens", "64 x 64 1 1", "bare.png: no caption;",
        "broken.png: found a truncated or damaged picture", "two.png: 80", "long.png: 900x30, 13% is kept",
    ):  # fmt: skip
        assert part in said
    assert "\x1b" not in said and "nothing to see to" not in said


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "a.png", 1)
    assert main(["check", str(tmp_path), "--size", "64"]) == 0
    assert "nothing to see to" in capsys.readouterr().out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(folder), "--size", "64", "--json", "--class-tokens", "sks"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {
        "pictures": 4, "left_out": 1, "duplicates": 0, "alike": 0, "tiny": 0, "long": 1, "wordy": 1, "uncaptioned": 0,
        "shown": 4,
    }  # fmt: skip
    assert {seen["name"]: seen["captions"] for seen in said["pictures"]}["bare.png"] == ["sks"]
    assert said["pictures"][1]["crop"]["original"] == [900, 30]


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.html"
    assert main(["check", str(folder), "--size", "64", "--page", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    shown = Shown()
    shown.feed(page.read_text())
    assert "script" not in shown.tags and '<script>alert("x")</script> &' in shown.text
    assert len(shown.sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in shown.sources)
    for part in ("broken.png: found a truncated", "caption of 80 tokens", "13% of it is kept", "long.png, 900x30"):
        assert part in shown.text
    assert main(["check", str(folder), "--size", "64", "--page", str(page)]) == 0
    assert (tmp_path / "page-2.html").read_bytes() == page.read_bytes()


def test_the_sheet(folder: Path, tmp_path: Path):
    """Of the long picture the middle is inside the frame, the rest is pale."""
    page = tmp_path / "page.png"
    assert main(["check", str(folder), "--size", "64", "--page", str(page)]) == 0
    with Image.open(page) as sheet:
        assert sheet.width == 2 * (192 + 8) + 8
        red = np.all(np.abs(np.asarray(sheet.convert("RGB")).astype(int) - (0xB3, 0x26, 0x1E)) < 4, axis=2)
    assert red.sum() > 100


def test_the_frame_is_where_the_crop_is():
    crop = usual_buckets(128).crop(900, 30)
    left, top, width, height = crop_shares(crop)
    assert (left + width / 2, top, height) == (pytest.approx(0.5, abs=0.01), 0, 1)
    assert width == pytest.approx(crop.bucket[0] / (900 * crop.bucket[1] / 30), abs=0.01)


def test_pictures_without_captions_of_a_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import tarfile

    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = stream.tell()
        tar.addfile(info, io.BytesIO(stream.getvalue()))
    assert main(["check", str(tmp_path / "x.tar"), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "x.tar/1: no caption" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["gone"], "gone: not found"),
        (["."], "holds no pictures"),
        ([".", "--page", "x.pdf"], "expected a page's name that ends in .html or .png"),
        ([".", "--size", "100"], "size: found 100, expected a multiple of 8"),
        ([".", "--bucket-step", "12"], "buckets: step is 12"),
        ([".", "--masks", "none"], "none: not found"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == 2
    said = capsys.readouterr()
    assert why in said.err and said.err.count("\n") == 1 and not list(tmp_path.iterdir())

"""The report is one file that asks for nothing, shows hostile names as text, and holds what it was given."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.evaluation.curves import Curves
from ldm.evaluation.verdict import verdict
from ldm.training.tune.report import PIXELS, Pair, Report, Samples, write_report

HOSTILE = "</p><script>alert('1')</script><img src=http://x.example/a.png onerror=alert(2)>\x1b[2J\udc80\u202e&quot;"
VOID = {"meta", "link", "img", "br", "path", "use"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags close in the order that they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def images(self) -> list[Image.Image]:
        links = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        start = "data:image/png;base64,"
        assert all(link.startswith(start) for link in links)
        return [Image.open(io.BytesIO(base64.b64decode(link.removeprefix(start)))) for link in links]


def curves(held_out: int = 6) -> Curves:
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(0, 501, 100)
    losses = (0.2 + 0.1 * torch.rand(1, 10 + held_out, 5, generator=generator)).repeat(6, 1, 1)
    losses *= 1 - 0.1 * (1 - torch.exp(-steps / 80))[:, None, None] * torch.rand(
        1, 10 + held_out, 1, generator=generator
    )
    return Curves(
        steps=steps,
        timesteps=torch.tensor([100, 300, 500, 700, 900]),
        train=losses[:, :10],
        train_swapped=1.1 * losses[:, :10],
        held_out=losses[:, 10:],
        held_out_swapped=1.1 * losses[:, 10:],
        logged=torch.arange(500),
        rates=torch.full((500,), 1e-4),
        gradients=torch.ones(500),
        pictures=10,
        epochs=50,
    )


def report(text: str = "a cat", held_out: int = 6) -> Report:
    measured = curves(held_out)
    red, blue = Image.new("RGB", (900, 300), "red"), Image.new("RGBA", (64, 64), (0, 0, 255, 128))
    return Report(
        title=text,
        verdict=verdict(measured),
        curves=measured,
        stages=("before", text, "after"),
        samples=(Samples(text, (red, None, blue)), Samples("", (blue, blue, blue))),
        notes=(text,),
        pairs=(Pair(text, red, blue),),
        settings={"rank": "16", text: text},
        costs={"training": "3 min"},
        left_out=(text,),
    )


def written(path: Path, shown: Report) -> tuple[str, Page]:
    write_report(path, shown)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_it_asks_for_nothing(tmp_path: Path):
    """No script, no handler, no address but data and places in the page, whatever the captions are."""
    text, page = written(tmp_path / "report.html", report(HOSTILE))
    assert not page.open  # every tag was closed
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "form", "base", "a"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#")), (tag, attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert text.count("http:") == text.count("http://x.example")  # only where a caption says so


def test_hostile_names_are_shown_as_text(tmp_path: Path):
    text, page = written(tmp_path / "report.html", report(HOSTILE))
    shown = (
        "</p><script>alert('1')</script><img src=http://x.example/a.png onerror=alert(2)>\\x1b[2J\\udc80\\u202e&quot;"
    )
    words = "".join(page.words)
    # title twice; the caption; a stage, of two rows; notes; a pair; a setting's name and value; left out
    assert words.count(shown) == 10
    assert not {"\x1b", "\u202e"} & set(text)


def test_it_holds_what_it_was_given(tmp_path: Path):
    shown = report()
    text, page = written(tmp_path / "report.html", shown)
    words = "".join(page.words)
    for sentence in (*shown.verdict.sentences, *shown.verdict.advice, *shown.notes, *shown.left_out):
        assert sentence in words
    assert shown.verdict.outcome in words and "3 min" in words and "rank" in words and "(no caption)" in words
    images = page.images()
    assert [image.size for image in images] == [(PIXELS, 107), *[(64, 64)] * 4, (PIXELS, 107), (64, 64)]
    assert images[0].getpixel((5, 5)) == (255, 0, 0)
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert "currentColor" in text and "var(--held-out)" in text and "#0102" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_plots_share_no_names(tmp_path: Path):
    """Three drawings in one page: a name that one defines is never taken for another's."""
    _, page = written(tmp_path / "report.html", report())
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in page.tags:
        for value in attributes.values():
            for start in ("url(#", "#m", "#p"):
                if value and value.startswith(start):
                    assert value.removeprefix("url(").strip("#)") in names


def test_the_same_report_is_the_same_file(tmp_path: Path):
    write_report(tmp_path / "one.html", report())
    write_report(tmp_path / "two.html", report())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_runs_that_broke_or_held_nothing_out(tmp_path: Path):
    broken = curves()
    for name in ("train", "train_swapped", "held_out", "held_out_swapped"):
        getattr(broken, name)[3:] = torch.inf
    text, _ = written(tmp_path / "a.html", Report("a", verdict(broken), broken))
    assert "at step 300 the losses were no longer numbers" in text and "Samples" not in text
    text, _ = written(tmp_path / "b.html", report(held_out=0))
    assert "training pictures is when another" in text and ">held out<" not in text


def test_errors_leave_the_old_page(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(LdmError, match="expected one of each stage"):
        write_report(path, replace(report(), stages=("before",)))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(LdmError, match="cannot be written"):
        write_report(tmp_path / "no" / "report.html", report())

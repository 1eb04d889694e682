"""An index on disk: killed, resumed, followed, damaged; always against one that is made anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_clip import WIDTH, draw, fake_clip, gallery
from PIL import Image

from ldm.errors import LdmError
from ldm.pipeline.clip.model import BATCH
from ldm.search import Share, build, open_index, update
from ldm.search.build import update_share
from ldm.search.query import Index
from ldm.weights.lock import locked

ROOT = Path(__file__).parents[2]

HELPERS = "import sys; sys.path[:0] = sys.argv[3:]; from fake_clip import fake_clip; from pathlib import Path\n"
SLOW_RUN = """
from ldm.search import update
folder, index = map(Path, sys.argv[1:3])
update(folder, index, fake_clip(pause=0.2), progress=lambda text, share: print(text, flush=True))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return gallery(tmp_path / "pictures", 40)


def tree(index: Path) -> set[str]:
    """The kinds of files in an index folder."""
    return {path.name.partition("-")[0] for path in index.iterdir()}


def check_like_fresh(index: Path, folder: Path, fresh: Path) -> Index:
    """The index equals one that is made anew: the same pictures, vectors and answers."""
    update(folder, fresh, fake_clip())
    ours, expected = open_index(index), open_index(fresh)
    found = [(p.found, p.hash) for p in ours.listing.pictures()]
    assert found == [(p.found, p.hash) for p in expected.listing.pictures()]
    assert {p.found.path for p in ours.listing.pictures()} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix.lower() in (".png", ".webp")
    }
    np.testing.assert_allclose(ours.vectors, expected.vectors, atol=1e-6)
    queries = np.random.default_rng(5).standard_normal((20, WIDTH)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for one, other in zip(ours.search(queries, 10), expected.search(queries, 10), strict=True):
        assert [hit.path for hit in one] == [hit.path for hit in other]
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], atol=1e-6)
    return ours


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_resumed_and_followed(tmp_path: Path) -> None:
    folder, index = gallery(tmp_path / "pictures", 5 * BATCH + 10), tmp_path / "index"
    arguments = [
        sys.executable,
        "-c",
        HELPERS + SLOW_RUN,
        str(folder),
        str(index),
        str(ROOT),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith(f"embedding {2 * BATCH} "):
                break
        with pytest.raises(LdmError, match=r"is being written by process \d+ on "):
            update(folder, index, fake_clip())
        run.send_signal(signal.SIGKILL)
    saved = len(list(index.glob("piece-*.npz")))
    assert 2 <= saved <= 4
    with pytest.raises(LdmError, match="is not finished; go on with: ldm index"):
        open_index(index)
    seen: list[int] = []
    report = update(folder, index, fake_clip(seen=seen))
    assert report.embedded == sum(seen) == (5 - saved) * BATCH + 10
    assert (report.pictures, report.added, report.bad) == (5 * BATCH + 10, 5 * BATCH + 10, [])
    check_like_fresh(index, folder, tmp_path / "fresh-1")

    for number in range(10):
        draw(next(folder.rglob(f"picture-{number:04d}.*")), 1000 + number)
        next(folder.rglob(f"picture-{number + 10:04d}.*")).unlink()
        draw(folder / "new" / f"{number}.png", 2000 + number)
    report = update(folder, index, fake_clip())
    assert (report.added, report.changed, report.removed, report.embedded) == (10, 10, 10, 20)
    check_like_fresh(index, folder, tmp_path / "fresh-2")
    assert tree(index) == {"index.json", "report.json", "lock", "vectors", "entries", "paths"}


def test_what_is_known_is_not_embedded_again(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    assert update(folder, index, fake_clip()).embedded == 40
    before = {path.name for path in index.iterdir()}
    assert update(folder, index, fake_clip()).embedded == 0
    assert {path.name for path in index.iterdir()} == before, "nothing changed, so nothing was written"
    (folder / "picture-0001.webp").touch()
    (folder / "picture-0002.PNG").rename(folder / "moved.PNG")
    (folder / "below 0").rename(folder / "elsewhere")
    seen: list[int] = []
    report = update(folder, index, fake_clip(seen=seen))
    assert (report.embedded, seen, report.changed, report.added) == (0, [], 0, report.removed)
    check_like_fresh(index, folder, tmp_path / "fresh")


def test_a_changed_file_of_the_same_size_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "white")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png", compress_level=0)
    update(folder, tmp_path / "index", fake_clip())
    Image.new("RGB", (16, 16), "blue").save(folder / "1.png", compress_level=0)
    assert update(folder, tmp_path / "index", fake_clip()).changed == 1
    hit = open_index(tmp_path / "index").search(fake_clip().text_vectors(["blue"]).numpy(), 1)[0][0]
    assert hit.path.name == "1.png" and hit.score == pytest.approx(1, abs=1e-5)


def test_bad_files_are_skipped_and_named(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<!doctype html><p>404")
    (folder / "cut.png").write_bytes((folder / "picture-0002.PNG").read_bytes()[:60])
    (folder / "gone.webp").symlink_to(folder / "nowhere.webp")
    Image.new("RGB", (2000, 2)).save(folder / "strip.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("no picture, and not named as one")
    (folder / ".hidden").mkdir()
    draw(folder / ".hidden" / "a.png", 1)
    draw(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")), 77)
    (folder / "loop").symlink_to(folder)
    report = update(folder, folder / ".ldm-index", fake_clip())
    assert report.pictures == 41
    bad = {bad.path: bad.reason for bad in report.bad}
    assert sorted(bad) == ["cut.png", "empty.png", "gone.webp", "page.jpg", "pipe.png", "strip.png"]
    assert bad["page.jpg"].startswith("found a web page, expected") and "a strip" in bad["strip.png"]
    assert "device or pipe" in bad["pipe.png"]
    told = json.loads((folder / ".ldm-index" / "report.json").read_text())
    assert told["pictures"] == 41 and {entry["path"]: entry["reason"] for entry in told["bad"]} == bad
    (folder / "empty.png").unlink()
    draw(folder / "empty.png", 5)
    assert len(update(folder, folder / ".ldm-index", fake_clip()).bad) == 5
    for row, picture in enumerate(open_index(folder).listing.pictures()):
        assert picture.found.path == open_index(folder).listing.path(row)


def test_a_photo_of_24_megapixels_is_indexed(tmp_path: Path) -> None:
    folder = gallery(tmp_path / "pictures", 3)
    Image.new("RGB", (6000, 4000), "red").save(folder / "photo.jpg")
    report = update(folder, tmp_path / "index", fake_clip())
    assert not report.bad
    (best,) = open_index(tmp_path / "index").search(fake_clip().text_vectors(["red"]).numpy(), 1)[0]
    assert best.path.name == "photo.jpg" and best.score == pytest.approx(1, abs=1e-3)


def test_folders_without_pictures(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match=r"empty: holds no pictures; expected \.png"):
        update(tmp_path / "empty", tmp_path / "index-1", fake_clip())
    (tmp_path / "empty" / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(LdmError, match=r"none of 1 pictures can be read, as a\.png: found a GIF"):
        update(tmp_path / "empty", tmp_path / "index-1", fake_clip())
    with pytest.raises(LdmError, match="expected a folder of pictures"):
        update(folder / "nowhere", tmp_path / "index-2", fake_clip())
    index = folder / ".ldm-index"
    update(folder, index, fake_clip())
    for path in folder.rglob("*.*"):
        if path.is_file() and index not in path.parents:
            path.unlink()
    with pytest.raises(LdmError, match="holds no pictures"):  # perhaps its disk is not there today
        update(folder, index, fake_clip())
    assert len(open_index(index)) == 40


def test_another_model_or_folder(folder: Path, tmp_path: Path) -> None:
    index, other = tmp_path / "index", fake_clip("b" * 64, name="other")
    update(folder, index, fake_clip())
    with pytest.raises(
        LdmError, match=r"made with fake \(aaaaaaaaaaaa, width 24\), found other \(bbbbbbbbbbbb"
    ) as caught:
        update(folder, index, other)
    assert "--rebuild" in str(caught.value) and "\n" not in str(caught.value)
    gallery(tmp_path / "more", 3)
    with pytest.raises(LdmError, match=r"is the index of .*pictures, found .*more"):
        update(tmp_path / "more", index, fake_clip())
    assert update(folder, index, other, rebuild=True).embedded == 40
    assert open_index(index).record.clip.name == "other"


def test_moved_with_its_folder(folder: Path, tmp_path: Path) -> None:
    update(folder, folder / ".ldm-index", fake_clip())
    folder.rename(tmp_path / "renamed")
    assert update(tmp_path / "renamed", tmp_path / "renamed" / ".ldm-index", fake_clip()).embedded == 0
    hit = open_index(tmp_path / "renamed").search(np.eye(1, WIDTH), 1)[0][0]
    assert hit.path.exists()


@pytest.mark.parametrize("kind", ["vectors", "entries", "paths", "nearest"])
@pytest.mark.parametrize("harm", ["cut", "gone", "grown"])
def test_damaged_files(tmp_path: Path, kind: str, harm: str, indexed: Path) -> None:
    shutil.copytree(indexed, tmp_path / "pictures")
    index = tmp_path / "pictures" / ".ldm-index"
    path = next(index.glob(f"{kind}-*"))
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[:-9] if harm == "cut" else data + b"more")
    with pytest.raises(LdmError, match="index is damaged") as caught:
        open_index(index)
    assert f"make it again: ldm index {tmp_path / 'pictures'} --rebuild" in str(caught.value)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    if kind != "nearest":  # which making an index does not read
        with pytest.raises(LdmError, match="index is damaged"):
            update(tmp_path / "pictures", index, fake_clip())
    update(tmp_path / "pictures", index, fake_clip(), rebuild=True)
    assert len(open_index(index)) == 40


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index that has a file of every kind."""
    folder = gallery(tmp_path_factory.mktemp("indexed") / "pictures", 40)
    update(folder, folder / ".ldm-index", fake_clip(), exact_up_to=20)
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 1, "clip": 5, "nearest": {}}', "is damaged"),
        ('{"format": 2}', "found format 2, expected 1"),
    ],
)
def test_a_broken_record(folder: Path, text: str, said: str) -> None:
    index = folder / ".ldm-index"
    update(folder, index, fake_clip())
    (index / "index.json").write_text(text)
    for attempt in (lambda: open_index(folder), lambda: update(folder, index, fake_clip())):
        with pytest.raises(LdmError, match=f"{said}.*; make it again: ldm index .*pictures --rebuild"):
            attempt()
    assert update(folder, index, fake_clip(), rebuild=True).pictures == 40


def test_numbers_that_are_none(folder: Path) -> None:
    update(folder, folder / ".ldm-index", fake_clip())
    path = next((folder / ".ldm-index").glob("vectors-*"))
    data = bytearray(path.read_bytes())
    data[-4 * WIDTH :] = b"\xff" * 4 * WIDTH
    path.write_bytes(data)
    with pytest.raises(LdmError, match="damaged"):
        open_index(folder).search(np.eye(1, WIDTH), 40)


@pytest.mark.parametrize("step", ["write_piece", "empty_vectors", "listing_of", "write_array", "write_record", "tidy"])
def test_stopped_anywhere(folder: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk at any moment serves, before the next run and after it."""
    index, before = tmp_path / "index", 40
    update(folder, index, fake_clip())
    draw(folder / "new.png", 1234)
    reached: list[str] = []

    def stop(*_: object, **__: object) -> None:
        reached.append(step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, step, stop)
        with pytest.raises(KeyboardInterrupt):
            update(folder, index, fake_clip())
    assert reached and len(open_index(index)) == before
    update(folder, index, fake_clip())
    check_like_fresh(index, folder, tmp_path / "fresh")
    assert tree(index) == {"index.json", "report.json", "lock", "vectors", "entries", "paths"}


def test_a_damaged_piece_is_embedded_anew(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    update_share(folder, index, fake_clip(), Share())
    piece = next(index.glob("piece-*"))
    piece.write_bytes(piece.read_bytes()[:-100])
    assert update(folder, index, fake_clip()).embedded == 40


def test_shares_of_several_machines(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    counts = [update_share(folder, index, fake_clip(), Share(number, 3)).embedded for number in (1, 2, 3)]
    assert sum(counts) == 40 and min(counts) > 0
    assert update(folder, index, fake_clip()).embedded == 0
    check_like_fresh(index, folder, tmp_path / "fresh")


def test_the_lock(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with locked(index, "--index", shared=True):
        update_share(folder, index, fake_clip(), Share(1, 2))
        with pytest.raises(LdmError, match=f"is being written by process {os.getpid()} on"):
            update(folder, index, fake_clip())
    with locked(index, "--index"), pytest.raises(LdmError, match="is being written"):
        update_share(folder, index, fake_clip(), Share(2, 2))
    update(folder, index, fake_clip())


def test_a_run_that_replaces_the_files_while_we_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that was read names files that are gone; the new one is read."""
    import ldm.search.query as query

    index = folder / ".ldm-index"
    update(folder, index, fake_clip())
    old = query.read_record(index)
    draw(folder / "new.png", 1234)
    update(folder, index, fake_clip())
    answers = iter([old])
    monkeypatch.setattr(query, "read_record", lambda path: next(answers, None) or build.read_record(path))
    assert len(open_index(index)) == 41


def test_an_index_is_no_file_and_has_a_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LdmError, match=r"file: cannot be made .*--index"):
        update(folder, tmp_path / "file", fake_clip())
    with pytest.raises(LdmError, match="holds no index; make one: ldm index FOLDER"):
        open_index(tmp_path / "nowhere")


@pytest.mark.parametrize("vectors", [np.zeros((1, WIDTH + 1)), np.zeros(WIDTH), np.full((1, WIDTH), np.nan)])
def test_queries_of_the_wrong_shape(folder: Path, vectors: np.ndarray) -> None:
    update(folder, folder / ".ldm-index", fake_clip())
    with pytest.raises(LdmError, match=f"expected finite vectors of width {WIDTH}"):
        open_index(folder).search(vectors)
    with pytest.raises(LdmError, match="top: found 0"):
        open_index(folder).search(np.eye(1, WIDTH), 0)
    assert len(open_index(folder).search(np.eye(2, WIDTH), 1000)[1]) == 40

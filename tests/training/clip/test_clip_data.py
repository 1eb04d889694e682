"""Pictures with captions from folders, shards and packed sets; what cannot be used is named, counted and left out."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from ldm.data.packed import write_packed
from ldm.errors import LdmError
from ldm.training.clip import data as clip_data
from ldm.training.clip.data import Fit, Pairs, open_pairs
from ldm.training.clip.objective import Pixels

FIT = Fit(16)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (24, 24), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return 20 * number, 255 - 20 * number, 128


def opened(source: Path, packed: Path, fit: Fit = FIT) -> Pairs:
    return open_pairs(source, packed, fit, held_out=0.2, mirror=False, seed=0)


def captions(pairs: Pairs) -> dict[str, list[str]]:
    return {name: list(texts) for name, texts in zip(pairs.names, pairs.texts, strict=True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good pictures in two folders."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        path = folder / ("more" if i % 2 else "") / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        path.write_bytes(png(colour(i), kind=("PNG", "JPEG", "WEBP")[i % 3]))
        path.with_suffix(".txt").write_text(f"number {i}\n\n the {i}th \n")
    return folder


def test_a_folder_of_pictures_and_captions(folder: Path, tmp_path: Path) -> None:
    (folder / "more" / "5.txt").unlink()
    (folder / "more" / "5.json").write_text(json.dumps({"caption": "five", "url": 1}))
    pairs = opened(folder, tmp_path / "packed")
    want = {f"{i}.{s}" if i % 2 == 0 else f"more/{i}.{s}": [f"number {i}", f"the {i}th"] for i, s in
            zip(range(6), ["png", "jpg", "webp"] * 2, strict=True)}  # fmt: skip
    assert captions(pairs) == want | {"more/5.webp": ["five"]}
    for name, picture in zip(pairs.names, pairs.pictures, strict=True):
        assert picture.shape == (16, 16, 3)
        assert np.abs(picture.mean(axis=(0, 1)) - colour(int(name.split("/")[-1][0]))).max() < 5
    assert sorted([*pairs.kept, *pairs.held_out]) == list(range(6)) and len(pairs.held_out) == 1


def shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_with_txt_or_json(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    shard(source / "a-0.tar", {"0.jpg": png(colour(0), kind="JPEG"), "0.txt": b"zero", "1.png": png(colour(1)),
                               "1.json": b'{"texts": ["one", "eins"]}'})  # fmt: skip
    shard(source / "a-1.tar", {"2.webp": png(colour(2), kind="WEBP"), "2.json": b'{"text": "two"}', "2.txt": b"deux"})
    pairs = opened(source, tmp_path / "packed")
    assert captions(pairs) == {"a-0.tar/0": ["zero"], "a-0.tar/1": ["one", "eins"], "a-1.tar/2": ["deux"]}
    alone = opened(source / "a-0.tar", tmp_path / "alone")
    assert list(alone.names) == ["a-0.tar/0", "a-0.tar/1"]


def test_a_broken_shard_gives_what_stands_before_the_break(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    shard(source / "a.tar", {f"{i}.{s}": d for i in range(4) for s, d in (("png", png(colour(i))), ("txt", b"x"))})
    whole = (source / "a.tar").read_bytes()
    (source / "b.tar").write_bytes(whole[: 3 * 1024 + 700])
    (source / "c.tar").write_bytes(b"<html>not found</html>" * 100)
    pairs = opened(source, tmp_path / "packed")
    assert [name for name in pairs.names if name.startswith("a")] == [f"a.tar/{i}" for i in range(4)]
    assert "b.tar: not a whole tar" in caplog.text and "c.tar: not a whole tar" in caplog.text


def test_a_file_that_is_in_a_shard_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.png", png(colour(0))), ("0.txt", b"zero"), ("0.png", png(colour(9))),
                           ("1.png", png(colour(1))), ("1.txt", b"one")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = opened(tmp_path / "a.tar", tmp_path / "packed")
    assert captions(pairs) == {"a.tar/0": ["zero"], "a.tar/1": ["one"]}
    assert tuple(pairs.pictures[0, 8, 8]) == colour(0)
    assert "a.tar/0.png: is there twice; the first one is used" in caplog.text and "whole tar" not in caplog.text


@pytest.mark.parametrize("harm", [b"", b'{"files": ', b"\xff\xfe", b"[]"])
def test_a_damaged_note_means_that_pictures_are_decoded_anew(harm: bytes, folder: Path, tmp_path: Path) -> None:
    first = opened(folder, tmp_path / "packed")
    (tmp_path / "packed" / "source.json").write_bytes(harm)
    assert opened(folder, tmp_path / "packed").digest() == first.digest()
    assert json.loads((tmp_path / "packed" / "source.json").read_text())["size"] == 16


@pytest.mark.parametrize("record", ['{"kind": "emoji"}', '{"texts": []}', '{"texts": "cat"}', '{"texts": [1]}', "7"])
def test_a_packed_set_without_captions(record: str, tmp_path: Path) -> None:
    pictures = ((np.zeros((16, 16, 3), np.uint8), {"texts": ["a"]}) for _ in range(2))
    write_packed(pictures, tmp_path, 16, "pictures")
    (tmp_path / "pictures.jsonl").write_text(f'{{"texts": ["a"]}}\n{record}\n')
    with pytest.raises(LdmError, match=r'record 2 is not an object with "texts", a list of captions; pack'):
        opened(tmp_path, tmp_path / "never")


def test_a_packed_set_is_used_as_it_is(tmp_path: Path) -> None:
    records = [({"texts": [f"number {i}, to the left"], "key": f"k{i}"}) for i in range(4)]
    for side in (16, 32):
        pictures = ((np.full((side, side, 3), i, np.uint8), record) for i, record in enumerate(records))
        write_packed(pictures, tmp_path, side, "pictures")
    pairs = open_pairs(tmp_path, tmp_path / "never", Fit(24), held_out=0.5, mirror=True, seed=0)
    assert pairs.pictures.shape == (4, 32, 32, 3), "the smallest that is large enough"
    assert captions(pairs)["k2"] == ["number 2, to the left"]
    assert not pairs.flips.any(), "a mirror image would belie the captions"
    assert not (tmp_path / "never").exists()


def test_unusable_pictures_are_named_counted_and_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bad = {
        "empty.png": b"",
        "page.jpg": b"<html>404</html>",
        "cut.png": png((1, 2, 3), (300, 300), "JPEG")[:400],
        "narrow.png": png((1, 2, 3), (4000, 3)),
        "._0.png": b"\0\5\x16\7Mac OS X",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "mute.png").write_bytes(png((1, 2, 3)))
    (folder / "blank.png").write_bytes(png((1, 2, 3)))
    (folder / "blank.txt").write_text(" \n ")
    (folder / "binary.png").write_bytes(png((1, 2, 3)))
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "folder.png").mkdir()
    pairs = opened(folder, tmp_path / "packed")
    assert len(pairs.names) == 6
    listed = (tmp_path / "packed" / "skipped.txt").read_text().splitlines()
    assert {line.partition(":")[0] for line in listed} == {*bad, "mute.png", "blank.png", "binary.png", "folder.png"}
    assert len(listed) == 9 and "6 pictures, 9 left out" in caplog.text
    assert all(line in caplog.text for line in listed)
    assert [line for line in listed if line.startswith("mute.png: no caption")]


def test_decoded_once_and_again_when_the_files_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    first = opened(folder, packed)
    with monkeypatch.context() as patch:
        patch.setattr(clip_data, "_pixels", None)
        assert opened(folder, packed).digest() == first.digest()
    (folder / "0.txt").write_text("another caption")
    assert opened(folder, packed).digest() != first.digest()
    (folder / "9.png").write_bytes(png(colour(9)))
    (folder / "9.txt").write_text("nine")
    assert len(opened(folder, packed).names) == 7
    assert opened(folder, packed, Fit(20)).pictures.shape == (7, 20, 20, 3)


@pytest.mark.parametrize("what", ["nothing", "empty", "no captions", "all bad", "no picture", "text file", "one"])
def test_what_cannot_be_trained_on_is_told_in_one_line(what: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    if what != "nothing":
        source.mkdir()
    match what:
        case "empty":
            expected = "found no pictures"
        case "no captions":
            (source / "a.png").write_bytes(png((1, 2, 3)))
            expected = r"none of 1 pictures can be used \(a.png: no caption"
        case "all bad":
            for i in range(3):
                (source / f"{i}.png").write_bytes(b"GIF89a")
                (source / f"{i}.txt").write_text("a")
            expected = r"none of 3 pictures can be used \(0.png: image: found"
        case "no picture":
            shard(source / "a.tar", {"0.txt": b"zero"})
            expected = r"none of 1 pictures can be used \(a.tar/0: no picture"
        case "text file":
            source = source / "a.txt"
            source.write_text("a")
            expected = "expected a folder or a .tar"
        case "one":
            (source / "a.png").write_bytes(png((1, 2, 3)))
            (source / "a.txt").write_text("a")
            expected = "found 1 usable picture, expected 2"
        case _:
            expected = "not found"
    with pytest.raises(LdmError, match=expected) as told:
        opened(source, tmp_path / "packed")
    assert "\n" not in str(told.value) and str(source) in str(told.value)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_pictures_come_to_the_tower_as_open_clips_transform_brings_them(resize: str, tmp_path: Path) -> None:
    generator, names = np.random.default_rng(0), ["wide", "tall", "small"]
    for name, shape in zip(names, [(40, 97, 3), (61, 33, 3), (9, 14, 3)], strict=True):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    pairs = opened(tmp_path, tmp_path / "packed", Fit(16, resize))  # type: ignore[arg-type]
    theirs: Any = image_transform_v2(PreprocessCfg(size=16, resize_mode=resize), is_train=False)
    for name, picture in zip(pairs.names, pairs.pictures, strict=True):
        got = Pixels(16).of(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]
        want = theirs(Image.open(tmp_path / name).convert("RGB"))
        assert torch.allclose(got, want, atol=1e-5), name

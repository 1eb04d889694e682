"""Folders, tables and shards: what is found is what other readers find, and every file is accounted for."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldm.data.captions import CaptionRules
from ldm.data.example import Defaults, PictureSet
from ldm.data.file_at import FileAt
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError

ROWS = [
    {"file_name": "a.png", "text": "an apple"},
    {"file_name": "sub/b.jpg", "text": "a bear, brown"},
    {"file_name": "sub/c.webp", "text": 'a "cat"\nof two lines'},
]


def picture(color: str = "red", format_: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, format_)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Mapping[str, bytes | str]], Path]:
    def write(files: Mapping[str, bytes | str]) -> Path:
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / "data"

    return write


def captions(pictures: PictureSet) -> dict[str, tuple[str, ...]]:
    return {example.name: example.captions for example in pictures.examples}


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


# Captions beside the pictures


def test_sidecars(folder: Callable):
    root = folder(
        {
            "1.png": picture(), "1.txt": "\ufeffone\nsecond line\n",
            "2.jpg": picture(format_="JPEG"), "2.caption": "two",
            "deep/er/3.webp": picture(format_="WEBP"), "deep/er/3.txt": " three ", "deep/er/3.caption": "not this",
            "4.PNG": picture(), "4.json": '{"caption": ["four", "quatre"], "width": 8}',
            "5.png": picture(), "5.txt": "\n", "6.png": picture(), "7.png": picture(), "7.txt": b"\xff\xfe7\0",
            "lost.txt": "no picture", "x.gif": b"GIF89a", "x.txt": "of a gif", "notes.md": "# notes", "LICENSE": "MIT",
            "__MACOSX/._1.png": b"\0\5\x16\7", ".git/8.png": picture(), ".DS_Store": "x",
        }
    )  # fmt: skip
    found = read_pictures(root)
    assert captions(found) == {
        "1.png": ("one",), "2.jpg": ("two",), "deep/er/3.webp": ("three",), "4.PNG": ("four", "quatre")
    }  # fmt: skip
    assert {line.partition(":")[0]: line.partition(": ")[2] for line in found.left_out} == {
        "__MACOSX/._1.png": "put there by macOS, no picture or caption",
        "5.png": "no caption; write one beside it, or give class tokens for all that have none",
        "6.png": "no caption; write one beside it, or give class tokens for all that have none",
        "7.png": "its caption (.txt) is not UTF-8; save it as UTF-8",
        "x.gif": "a .gif picture, expected PNG, JPEG or WebP; convert it",
        "lost.txt": "no picture of this name",
        "deep/er/3.caption": "not read, 3.txt comes before it",
    }
    assert found.notes == (
        "not read, for they are no pictures or captions: .DS_Store, LICENSE, notes.md",
        "hidden folders were not looked into: .git",
    )
    assert found.examples[0].image.read(1000) == picture()


def test_options(folder: Callable):
    root = folder({"a.png": picture(), "a.txt": "{x|y}\nleft side", "a.caption": "z", "b.png": picture()})
    lines = read_pictures(root, Defaults(CaptionRules(wildcards=True, drop=0.1), class_tokens="", flip=True, repeats=3))
    assert captions(lines) == {"a.png": ("{x|y}", "left side"), "b.png": ("",)}
    assert [(e.flip, e.repeats, e.rules.drop) for e in lines.examples] == [(False, 3, 0.1), (True, 3, 0.1)]
    assert lines.notes == ("never mirrored, for what their captions say: a.png",)
    assert captions(read_pictures(root, Defaults(caption_suffix=".caption"))) == {"a.png": ("z",)}


def test_masks_and_hints(folder: Callable):
    root = folder(
        {f"{name}.{kind}": picture() if kind == "png" else name for name in "abc" for kind in ("png", "txt")}
        | {"a-masklabel.png": picture(), "d-masklabel.png": picture()}
        | {"masks/b.jpg": picture(), "edges/a.png": picture(), "edges/b.webp": picture()}
    )
    found = read_pictures(root, Defaults(masks=root / "masks", hints=root / "edges"))
    assert [(e.name, e.mask, e.hint) for e in found.examples] == [
        ("a.png", FileAt(root / "a-masklabel.png"), FileAt(root / "edges/a.png")),
        ("b.png", FileAt(root / "masks/b.jpg"), FileAt(root / "edges/b.webp")),
    ]
    assert found.left_out == (
        f"c.png: no picture c in {root / 'edges'}; add it",
        "d-masklabel.png: a mask, but no picture of its name",
    )
    assert read_pictures(root, Defaults(masks=root / "masks", hints=None, class_tokens="")).notes == (
        "without a mask, so that the whole picture counts: c.png, edges/a.png, edges/b.webp",
    )


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "holds no pictures, expected PNG, JPEG or WebP files, or .tar shards of them"),
        ({"a.png": b"x"}, "holds no picture that can be used; 1 left out, as a.png: no caption"),
    ],
)
def test_nothing_there(folder: Callable, tmp_path: Path, files: dict, why: str):
    (tmp_path / "data").mkdir()
    with pytest.raises(LdmError, match=why):
        read_pictures(folder(files))


def test_no_folder(tmp_path: Path):
    with pytest.raises(LdmError, match="gone: not found, expected a folder of pictures"):
        read_pictures(tmp_path / "gone")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(LdmError, match=r"expected a folder, a \.tar shard, a \.parquet file or a kohya \.toml"):
        read_pictures(tmp_path / "x.zip")


def test_a_test_split_is_not_taken_without_a_word(folder: Callable):
    root = folder({f"{split}/a.{kind}": picture() for split in ("train", "test") for kind in ("png", "webp")})
    found = read_pictures(root, Defaults(class_tokens="x"))
    assert found.notes == ("all of train, test is taken; give one of these folders to take it alone",)
    assert not read_pictures(root / "train", Defaults(class_tokens="x")).notes


def test_links_are_followed_once(folder: Callable, tmp_path: Path):
    root = folder({"real/a.png": picture(), "real/a.txt": "a"})
    (root / "again").symlink_to(root / "real")
    (root / "real/loop").symlink_to(root)
    assert len(read_pictures(root).examples) == 1


# Tables


def write_table(root: Path, kind: str) -> None:
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "csv":
        rows = ["file_name,text", *('{file_name},"{0}"'.format(r["text"].replace('"', '""'), **r) for r in ROWS)]
        (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), root / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder_as_datasets_reads_it(folder: Callable, tmp_path: Path, kind: str):
    datasets = pytest.importorskip("datasets")
    files = {"a.png": picture("red"), "sub/b.jpg": picture("green", "JPEG"), "sub/c.webp": picture("blue", "WEBP")}
    root = folder(files)
    write_table(root, kind)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    told = {Path(row["image"]["path"]).relative_to(root).as_posix(): row["text"] for row in theirs}
    assert len(told) == 3
    assert {name: texts[0] for name, texts in captions(read_pictures(root)).items()} == told
    assert captions(read_pictures(root / f"metadata.{kind}")) == captions(read_pictures(root))


def test_rows_that_are_no_use(folder: Callable):
    lines = [
        '{"file_name": "a.png", "text": "one"}', '{"file_name": "a.png", "caption": "another", "more": 3}', "",
        '{"file_name": "../out.png", "text": "x"}', '{"file_name": "/etc/passwd", "text": "x"}', "{not json",
        "[1]", '{"text": "no name"}', '{"file_name": 7}', '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "b.png", "text": null}', '{"file_name": "c.png", "prompt": ""}', "[" * 100_000,
    ]  # fmt: skip
    root = folder({name: picture() for name in ("a.png", "b.png", "c.png", "d.png", "../out.png")})
    (root / "metadata.jsonl").write_text("\n".join(lines))
    (root / "metadata.csv").write_text("file_name,text\nd.png,not read\n")
    (root / "b.txt").write_text("from its file")
    found = read_pictures(root)
    assert captions(found) == {"a.png": ("one", "another"), "b.png": ("from its file",)}
    assert [line.partition(";")[0] for line in found.left_out] == [
        "metadata.jsonl line 4: file_name ../out.png leaves the folder",
        "metadata.jsonl line 5: file_name /etc/passwd leaves the folder",
        "metadata.jsonl line 6: is not JSON",
        "metadata.jsonl line 7: is no JSON object",
        "metadata.jsonl line 8: has no file_name",
        "metadata.jsonl line 9: file_name is 7, expected a file's name",
        "metadata.jsonl line 13: is not JSON",
        "metadata.csv: not read, metadata.jsonl is beside it",
        "c.png: no caption",
        "d.png: no caption",
        "gone.png: not found, though a table names it",
    ]


def test_names_as_other_systems_write_them(folder: Callable):
    """Windows' separators, macOS' accents (a letter, then its accent), and ends of lines inside a caption."""
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    rows = [
        {"file_name": "sub\\a.png", "text": "one\u2028two", "mask_file_name": f"m\\{composed}"},
        {"file_name": composed, "text": "coffee"}, {"file_name": "..\\out.png", "text": "not ours"},
        {"file_name": "odd\\name.png", "text": "a backslash"}, {"file_name": "./sub//b.png", "text": "b"},
    ]  # fmt: skip
    table = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    names = ("sub/a.png", "sub/b.png", apart, f"m/{apart}", "odd\\name.png", "odd/name.png", "../out.png")
    root = folder({"metadata.jsonl": table, **{name: picture() for name in names}})
    found = read_pictures(root)
    told = {"sub/a.png": "one\u2028two", apart: "coffee", "odd\\name.png": "a backslash", "sub/b.png": "b"}
    assert captions(found) == {name: (caption,) for name, caption in told.items()}
    assert [example.mask for example in found.examples if example.mask] == [FileAt(root / "m" / apart)]
    assert [line.partition(";")[0] for line in found.left_out] == [
        "odd/name.png: no caption", "..\\out.png: not found, though a table names it",
    ]  # fmt: skip


def test_columns_of_masks_and_conditions(folder: Callable):
    row = {"file_name": "a.png", "text": "a", "mask_file_name": "m/a.png", "conditioning_image_file_name": "e/a.png"}
    files = {"metadata.jsonl": json.dumps(row), **{name: picture() for name in ("a.png", "m/a.png", "e/a.png")}}
    root = folder(files)
    (example,) = read_pictures(root).examples
    assert (example.mask, example.hint) == (FileAt(root / "m/a.png"), FileAt(root / "e/a.png"))


def test_a_second_caption_of_a_picture_keeps_its_mask_and_condition(folder: Callable):
    rows = [{"text": "a", "mask_file_name": "m/a.png", "conditioning_image_file_name": "e/a.png"}, {"text": "b"}]
    table = "\n".join(json.dumps({"file_name": "a.png", **row}) for row in rows).encode()
    root = folder({"a.png": picture(), "m/a.png": picture(), "e/a.png": picture(), "metadata.jsonl": table})
    (example,) = [example for example in read_pictures(root).examples if example.name == "a.png"]
    assert example.captions == ("a", "b")
    assert (example.mask, example.hint) == (FileAt(root / "m/a.png"), FileAt(root / "e/a.png"))
    (root / "m/a.png").unlink()
    with pytest.raises(LdmError, match=r"a\.png, which its row names, is not there"):
        read_pictures(root)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metadata.csv", b"file_name,text\na.png,x,y\n", "line 2: has more values than columns"),
        ("metadata.csv", b"file_name,text\na.png,\xe9\n", "is not UTF-8"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "is not CSV"),
        ("metadata.parquet", b"PAR1 and then nothing", "is no whole Parquet file"),
    ],
)
def test_broken_tables(folder: Callable, name: str, content: bytes, why: str):
    found = read_pictures(folder({name: content, "a.png": picture(), "a.txt": "from its file"}))
    assert captions(found) == {"a.png": ("from its file",)}
    assert len(found.left_out) == 1 and why in found.left_out[0]


# Shards


def test_shards_as_webdataset_reads_them(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    members = []
    for number in range(5):
        key = f"{'abc'[number % 3]}/{number:04}"
        members += [(f"{key}.png", picture("red" if number % 2 else "blue")), (f"{key}.txt", f"text {number}".encode())]
    path = tar(tmp_path / "x-000.tar", members)
    theirs = {
        sample["__key__"]: (sample["png"], sample["txt"].decode())
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    for where in (path, tmp_path):
        found = read_pictures(where)
        ours = {e.name.removeprefix("x-000.tar/"): (e.image.read(10_000), e.captions[0]) for e in found.examples}
        assert ours == theirs and len(ours) == 5 and not found.left_out
    examples = read_pictures(path).examples
    assert examples[3].image.read(10_000) == members[6][1]  # in any order


def test_members_of_samples(tmp_path: Path):
    members = [
        ("./1.JPG", picture(format_="JPEG")), ("./1.json", b'{"texts": ["a", "b"]}'), ("./1.mask.png", picture()),
        ("./1.hint.png", picture()), ("2.jpg", picture()), ("3.txt", b"no picture"), ("4.gif", b"GIF89a"),
        ("5.png", picture()), ("5.json", b"{"), ("__MACOSX/._5.png", b"x"), ("1.txt.bak", b"x"),
        ("v1.2/6.png", picture()), ("v1.2/6.txt", b"six"), ("7.cls", b"3"), ("v1.2/6.png", picture("blue")),
    ]  # fmt: skip
    found = read_pictures(tar(tmp_path / "x.tar", members))
    assert captions(found) == {"x.tar/1": ("a", "b"), "x.tar/v1.2/6": ("six",)}
    first, sixth = found.examples
    assert first.mask and first.hint and first.mask.read(999) == picture() == sixth.image.read(999)
    assert [line.partition(";")[0] for line in found.left_out] == [
        "x.tar/2: no caption",
        "x.tar/3: no picture beside .txt",
        "x.tar/4: a .gif picture, expected PNG, JPEG or WebP",
        "x.tar/5: its caption (.json) is not JSON",
        "x.tar/__MACOSX/._5.png: put there by macOS, no picture or caption",
        "x.tar/v1.2/6.png: there is another of this name before it",
    ]


@pytest.mark.parametrize("cut", [1024, 700, 512 * 3 + 5])
def test_a_shard_that_is_cut_short(tmp_path: Path, cut: int):
    members = [(f"{n}.{kind}", picture() if kind == "png" else b"text") for n in range(3) for kind in ("png", "txt")]
    path = tar(tmp_path / "x.tar", members)
    whole = (2 * len(members)) * 512
    path.write_bytes(path.read_bytes()[: whole - cut + 1024 if cut == 1024 else whole - cut])
    found = read_pictures(tmp_path)
    assert 1 <= len(found.examples) <= 3 and any("copy the shard again" in line for line in found.left_out)
    for example in found.examples:
        assert example.image.read(9999) == picture()


def test_no_tar_at_all(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(LdmError, match=r"x\.tar: not a whole tar, unpacked"):
        read_pictures(tmp_path)


# Bytes


def test_bytes_at_a_place(tmp_path: Path):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert FileAt(path).read(10) == b"0123456789" and FileAt(path, 3, 4).read(4) == b"3456"
    assert FileAt(path, 4).read(99) == b"456789"
    for file, limit, why in (
        (FileAt(path), 9, "more than"),
        (FileAt(path, 3, 4), 3, "more than"),
        (FileAt(path, 8, 4), 9, "found 2 bytes, expected 4"),
        (FileAt(tmp_path), 9, "is no plain file"),
        (FileAt(tmp_path / "g"), 9, "not found"),
        (FileAt(tmp_path / "a\0b"), 9, "a\\\\x00b"),
    ):
        with pytest.raises(LdmError, match=why):
            file.read(limit)


def test_class_pictures_from_a_folder_of_their_own(folder: Callable):
    root = folder({"own/a.png": picture(), "own/a.txt": "sks dog", "dogs/1.png": picture(), "dogs/2.png": picture()})
    defaults = Defaults(regular=root / "dogs", regular_tokens="dog")
    found = read_pictures(root / "own", defaults)
    assert [(e.name, e.captions[0], e.regular) for e in found.examples] == [
        ("a.png", "sks dog", False), ("1.png", "dog", True), ("2.png", "dog", True)
    ]  # fmt: skip
    with pytest.raises(LdmError, match="holds no picture that can be used"):
        read_pictures(root / "own", replace(defaults, caption_suffix=".none"))

"""Pictures inside Parquet files: what datasets writes is what is read, and every row is accounted for."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image, ImageChops
from pyarrow import parquet

from ldm.data.example import Defaults
from ldm.data.parquet_pictures import CellAt
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError

COLORS = ("red", "green", "blue", "gold", "pink")
BYTES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, columns: dict[str, Any], rows_a_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group)
    return path


def structs(cells: list[bytes | None]) -> pyarrow.Array:
    return pyarrow.array([None if cell is None else {"bytes": cell, "path": None} for cell in cells], BYTES)


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    """Out of order too, and from the groups of rows that it chose."""
    pictures = [Image.new("RGB", (8, 6), color) for color in COLORS]
    hints = [Image.new("RGB", (8, 6), "white")] * len(COLORS)
    theirs = datasets.Dataset.from_dict({"image": pictures, "conditioning_image": hints, "text": list(COLORS)})
    theirs = theirs.cast_column("image", datasets.Image()).cast_column("conditioning_image", datasets.Image())
    theirs.to_parquet(tmp_path / "train-00000-of-00001.parquet", batch_size=2)
    found = read_pictures(tmp_path)
    assert found.left_out == () and [example.captions for example in found.examples] == [(color,) for color in COLORS]
    for number in (4, 0, 3, 1, 2):
        ours = Image.open(io.BytesIO(found.examples[number].image.read(2**20)))
        assert ImageChops.difference(ours.convert("RGB"), theirs[number]["image"].convert("RGB")).getbbox() is None
        hint = found.examples[number].hint
        assert hint is not None and Image.open(io.BytesIO(hint.read(2**20))).getpixel((0, 0)) == (255, 255, 255)


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    columns = {"image": structs([png("red"), None, png("blue"), png("gold")]), "caption": ["a", "b", None, "d"]}
    found = read_pictures(write(tmp_path / "x.parquet", columns))
    assert [(example.name, example.captions) for example in found.examples] == [
        ("x.parquet row 1", ("a",)), ("x.parquet row 4", ("d",)),
    ]  # fmt: skip
    assert found.left_out == (
        "x.parquet row 2: holds no picture's bytes; remove it, or put the picture in",
        "x.parquet row 3: no caption; write one beside it, or give class tokens for all that have none",
    )
    assert found.examples[1].image.read(2**20) == png("gold")


def test_plain_bytes_and_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "x.parquet", {"image": pyarrow.array([png("red")]), "text": ["of a table"]})
    (tmp_path / "a.png").write_bytes(png("blue"))
    (tmp_path / "a.txt").write_text("of a file")
    found = read_pictures(tmp_path)
    assert {example.name: example.captions for example in found.examples} == {
        "a.png": ("of a file",), "deep/x.parquet row 1": ("of a table",),
    }  # fmt: skip


def test_pictures_without_captions_take_the_class_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs([png("red")])})
    assert read_pictures(path, Defaults(class_tokens="a dog")).examples[0].captions == ("a dog",)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a"]}, "has no column 'image'; found text"),
        ({"image": ["a.png"], "text": ["a"]}, "its column 'image' is string, expected {bytes, path} or bytes"),
    ],
)
def test_what_holds_no_pictures_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    write(tmp_path / "x.parquet", columns)
    (tmp_path / "a.png").write_bytes(png("blue"))
    (tmp_path / "a.txt").write_text("a")
    assert read_pictures(tmp_path).left_out == (f"x.parquet: {said}",)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs([png("red")]), "text": ["a"]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LdmError, match=r"1 left out, as x\.parquet: is no whole Parquet file"):
        read_pictures(path)


def test_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Parquet's writers take the caller's word that bytes are UTF-8."""
    wrong = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    for name, columns in (("x", {"image": structs([png("red")])}), ("metadata", {"file_name": ["a.png"]})):
        write(tmp_path / f"{name}.parquet", {**columns, "text": wrong})
    (tmp_path / "a.png").write_bytes(png("blue"))
    (tmp_path / "a.txt").write_text("a")
    found = read_pictures(tmp_path)
    assert [example.name for example in found.examples] == ["a.png"]
    assert [line.split(" (")[0] for line in found.left_out] == [
        "metadata.parquet: is no whole Parquet file", "x.parquet: is no whole Parquet file",
    ]  # fmt: skip


def test_a_file_that_is_changed_while_it_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": structs([png("red")]), "text": ["a"]})
    image = read_pictures(path).examples[0].image
    assert isinstance(image, CellAt) and image.read(2**20) == png("red")
    with pytest.raises(LdmError, match=r"image of row 1, group 1: found more than .* MiB, expected a picture"):
        image.read(10)
    write(path, {"image": structs([png("blue")]), "text": ["a"]})
    os.utime(path, ns=(0, image.changed + 10**9))
    with pytest.raises(LdmError, match="the file was changed meanwhile; start again"):
        image.read(2**20)
    path.unlink()
    with pytest.raises(LdmError, match="cannot be read"):
        image.read(2**20)

"""kohya's folders and data set files, against expectations written from the documentation of sd-scripts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.captions import CaptionRules
from ldm.data.example import Defaults
from ldm.data.file_at import FileAt
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError


def write(root: Path, *names: str) -> Path:
    for name in names:
        path, _, text = name.partition("=")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        (root / path).write_bytes(text.encode() if "=" in name else stream.getvalue())
    return root


def test_concept_folders(tmp_path: Path):
    root = write(
        tmp_path, "10_sks dog/a.png", "10_sks dog/b.png", "10_sks dog/b.txt=a dog in snow", "2_my_style/c.png",
        "reg_1_dog/d.png", "reg_cat/e.png", "0_none/f.png", "log/g.png", "h.png",
    )  # fmt: skip
    found = read_pictures(root)
    assert [(e.name, e.captions, e.repeats, e.regular) for e in found.examples] == [
        ("10_sks dog/a.png", ("sks dog",), 10, False),
        ("10_sks dog/b.png", ("a dog in snow",), 10, False),
        ("2_my_style/c.png", ("my_style",), 2, False),
        ("reg_1_dog/d.png", ("dog",), 1, True),
        ("reg_cat/e.png", ("cat",), 1, True),
    ]
    assert found.left_out == (
        "0_none: its pictures are to be shown 0 times; give it a number",
        "h.png: lies in none of the folders named with their repeats; move it into one",
    )
    assert found.notes == (
        "10_sks dog: shown 10 times an epoch, 'sks dog' where there is no caption; pictures: 2",
        "2_my_style: shown 2 times an epoch, 'my_style' where there is no caption; pictures: 1",
        "reg_1_dog: shown 1 times an epoch, 'dog' where there is no caption; pictures of the class: 1",
        "reg_cat: shown 1 times an epoch, 'cat' where there is no caption; pictures of the class: 1",
        "folders that are not named as 10_sks dog are not read: log",
    )


def test_a_folder_for_the_class(tmp_path: Path):
    write(tmp_path, "img/3_sks dog/a.png", "reg/1_dog/b.png", "reg/1_dog/b.txt=any dog")
    found = read_pictures(tmp_path / "img", Defaults(regular=tmp_path / "reg"))
    assert [(e.captions[0], e.repeats, e.regular) for e in found.examples] == [
        ("sks dog", 3, False), ("any dog", 1, True)
    ]  # fmt: skip


TOML = """
[general]
shuffle_caption = true
keep_tokens = 2
caption_extension = ".txt"
caption_dropout_rate = 0.05

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 1
caption_prefix = "by me,"

  [[datasets.subsets]]
  image_dir = "one"
  num_repeats = 10
  class_tokens = "sks dog"
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "class"
  is_reg = true
  class_tokens = "dog"
  keep_tokens = 3
  caption_prefix = ""
  color_aug = true

[[datasets]]
  [[datasets.subsets]]
  image_dir = "two"
  metadata_file = "two.json"
  caption_tag_dropout_rate = 1
  random_crop = true
  enable_wildcard = true
  conditioning_data_dir = "edges"
"""


def test_toml(tmp_path: Path):
    table = {
        "two/e.png": {"caption": "not by this name"},
        "e": {"caption": "a cat", "tags": "cat, sits"},
        "f.png": {"tags": "x"},
        "D:\\pictures\\two\\g.png": {"caption": "elsewhere"},
        "/mnt/two/g": {"caption": "the first of both"},
    }
    write(
        tmp_path,
        "one/a.png",
        "one/b.png",
        "one/b.txt=b",
        "one/deeper/c.png",
        "class/d.png",
        "two/e.png",
        "two/f.png",
        "two/g.png",
    )
    write(tmp_path, "edges/e.png", "edges/f.png", "edges/g.png", f"two.json={json.dumps(table)}", f"set.toml={TOML}")
    found = read_pictures(tmp_path / "set.toml")
    first = CaptionRules(shuffle=True, keep=1, prefix="by me,", drop=0.05)
    third = CaptionRules(shuffle=True, keep=2, drop=0.05, drop_tags=1, wildcards=True)
    assert [(e.name, e.captions, e.repeats, e.flip, e.random_crop, e.regular) for e in found.examples] == [
        ("one/a.png", ("sks dog",), 10, True, False, False),
        ("one/b.png", ("b",), 10, True, False, False),
        ("class/d.png", ("dog",), 1, False, False, True),
        ("two/e.png", ("a cat, cat, sits",), 1, False, True, False),
        ("two/f.png", ("x",), 1, False, True, False),
        ("two/g.png", ("elsewhere",), 1, False, True, False),
    ]
    assert [e.rules for e in found.examples] == [
        first, first, CaptionRules(shuffle=True, keep=3, drop=0.05), third, third, third
    ]  # fmt: skip
    assert found.examples[3].hint == FileAt(tmp_path / "edges/e.png")
    assert found.left_out == (
        "two.json: names two/e.png, which is not there", "two.json: names /mnt/two/g, which is not there",
    )  # fmt: skip
    assert found.notes == (
        "set.toml: resolution, batch_size are not taken from it, but from the options of the command",
        "set.toml: without effect here: color_aug",
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = [", "set.toml: is not TOML"),
        ("datasets = 3", "datasets: expected one"),
        ("[more]", "more is unknown; known are general, datasets"),
        ("[[datasets]]", "datasets 1, subsets: expected one"),
        (
            "[[datasets]]\nrepeats=1\n[[datasets.subsets]]\nimage_dir='x'",
            "repeats is unknown; known are shuffle_caption",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nnum_repeats=true", "num_repeats is True, expected int"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nnum_repeats=0", "num_repeats is 0, expected 1 or more"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nflip_aug='yes'", "flip_aug is 'yes', expected bool"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1", "image_dir is missing"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'", "x: not found, expected a folder of pictures"),
        ("[general]\nimage_dir='x'\n[[datasets]]\n[[datasets.subsets]]", "general: image_dir is unknown"),
    ],
)
def test_toml_that_is_wrong(tmp_path: Path, text: str, why: str):
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(LdmError, match=why) as caught:
        read_pictures(tmp_path / "set.toml")
    assert "\n" not in str(caught.value)

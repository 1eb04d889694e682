"""The cache of tensors on disk: whole entries are used, all others are made anew."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.data.buckets import usual_buckets
from ldm.data.captions import CaptionRules
from ldm.data.example import Example
from ldm.data.file_at import FileAt
from ldm.errors import LdmError
from ldm.models.presets import small, tiny
from ldm.pipeline.load import random_system
from ldm.training.tune.cache import Cache
from ldm.training.tune.pictures import prepare

KEY = {"what": "latent", "picture": "ab", "left": 3}


class Maker:
    """Counts how often it is asked."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"latent": torch.full((2, 3), self.value), "hint": torch.arange(4, dtype=torch.uint8)}


def entry(folder: Path) -> Path:
    (path,) = folder.rglob("*.safetensors")
    return path


def test_it_is_made_once_and_any_reader_of_the_format_reads_it(tmp_path):
    cache, make = Cache(tmp_path / "c"), Maker()
    first, second = cache.get(KEY, make), cache.get(dict(reversed(KEY.items())), make)
    assert make.calls == 1
    theirs = load_file(entry(tmp_path))
    for name in ("latent", "hint"):
        assert torch.equal(first[name], second[name]) and torch.equal(theirs[name], first[name])
        assert theirs[name].dtype == first[name].dtype


def test_another_key_is_another_entry(tmp_path):
    cache = Cache(tmp_path)
    cache.get(KEY, Maker())
    assert cache.read({**KEY, "left": 4}) is None
    assert cache.get({**KEY, "left": 4}, Maker(2.0))["latent"][0, 0] == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_what_is_not_whole_is_made_anew(tmp_path, damage, caplog):
    cache, make = Cache(tmp_path), Maker()
    cache.get(KEY, make)
    path = entry(tmp_path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    else:  # a whole entry of something else, under this one's name
        other = Cache(tmp_path / "other")
        other.get({**KEY, "left": 9}, Maker(7.0))
        path.write_bytes(entry(tmp_path / "other").read_bytes())
    assert cache.get(KEY, make)["latent"][0, 0] == 1
    assert make.calls == 2 and "made anew" in caplog.text
    assert cache.read(KEY) is not None


@pytest.mark.parametrize("where", ["folder", "entry"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, where):
    cache = Cache(tmp_path / "cache")
    blocked = cache.folder if where == "folder" else cache.path(KEY).parent
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder should be")
    with pytest.raises(
        LdmError, match=r"cache .*: cannot be written \(.*\); make room, or give another --cache"
    ) as told:
        cache.get(KEY, Maker())
    assert "\n" not in str(told.value)


def test_a_full_disk_is_told_and_ends_the_run(tmp_path, monkeypatch):
    """One line, and not one for each picture."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    pictures = [Example("a.png", FileAt(tmp_path / "a.png"), ("a",), CaptionRules())] * 2
    model = random_system(tiny(small()))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LdmError, match=r"cache .*c: cannot be written \(no space left on device\)"):
        list(prepare(pictures, usual_buckets(64), model.autoencoder, Cache(tmp_path / "c")))
    assert not list((tmp_path / "c").rglob("*.*"))  # nor is anything half left


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_made_is_told_as_it_is(tmp_path):
    def make() -> dict[str, torch.Tensor]:
        raise LdmError("a.png: is broken")

    with pytest.raises(LdmError, match=r"^a\.png: is broken$"):
        Cache(tmp_path).get(KEY, make)

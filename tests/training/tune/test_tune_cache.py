"""The cache of tensors on disk: whole entries are used, all others are made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.training.tune.cache import Cache

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

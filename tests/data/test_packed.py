from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm.data.packed import open_packed, pack
from ldm.errors import LdmError

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], Path]


def test_packed_pictures_lie_beside_their_records(
    members: Members, pictures: np.ndarray, write_shard: WriteShard, tmp_path: Path
) -> None:
    write_shard("pictures-00.tar", members[:4])
    write_shard("pictures-01.tar", members[4:])
    write_shard("heldout-00.tar", members[:2])
    pack(tmp_path, tmp_path / "out", 8)
    pixels, records = open_packed(tmp_path / "out", 8)
    np.testing.assert_array_equal(pixels, pictures)
    assert records[3] == {"texts": ["picture 3", "no. 3"], "kind": "emoji", "key": "3"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pictures-8.npy", "pictures.jsonl"]
    pack(tmp_path, tmp_path / "out", 4)
    halved, _ = open_packed(tmp_path / "out", 4)
    means = pictures.reshape(5, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(halved - means).max() <= 1  # rounded after each axis


def test_a_set_is_packed_again_only_when_its_shards_change(
    members: Members, write_shard: WriteShard, tmp_path: Path
) -> None:
    shard = write_shard("pictures-00.tar", members)
    os.utime(shard, (1, 1))
    pack(tmp_path, tmp_path / "out", 8)
    array = tmp_path / "out" / "pictures-8.npy"
    first = array.stat().st_ino
    pack(tmp_path, tmp_path / "out", 8)
    assert array.stat().st_ino == first
    os.utime(shard)
    os.utime(array, (2, 2))
    pack(tmp_path, tmp_path / "out", 8)
    assert array.stat().st_mtime > 2


def test_a_fault_leaves_no_file_behind(members: Members, write_shard: WriteShard, tmp_path: Path) -> None:
    write_shard("pictures-00.tar", [*members[:6], ("000003.webp", b"RIFF"), members[7]])
    with pytest.raises(LdmError, match=r"pictures-00\.tar: 000003: cannot be decoded"):
        pack(tmp_path, tmp_path / "out", 8)
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_and_packed_add_up(
    members: Members, pictures: np.ndarray, write_shard: WriteShard, tmp_path: Path
) -> None:
    write_shard("pictures-00.tar", [*members[:6], ("000003.webp", b"RIFF"), members[7], members[8]])
    skipped: list[str] = []
    pack(tmp_path, tmp_path / "out", 8, skipped=skipped)
    pixels, records = open_packed(tmp_path / "out", 8)
    np.testing.assert_array_equal(pixels, pictures[:3])
    assert len(records) == 3
    assert len(skipped) == 2  # one cannot be decoded, one has no record


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"no pictures-\*\.tar found"):
        pack(tmp_path, tmp_path / "out", 8)


@pytest.mark.parametrize("spoil", ["array missing", "records missing", "array cut", "one record less", "not JSON"])
def test_a_broken_set_is_not_opened(spoil: str, members: Members, write_shard: WriteShard, tmp_path: Path) -> None:
    write_shard("pictures-00.tar", members)
    pack(tmp_path, tmp_path, 8)
    array, records = tmp_path / "pictures-8.npy", tmp_path / "pictures.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    if spoil == "array missing":
        array.unlink()
    elif spoil == "records missing":
        records.unlink()
    elif spoil == "array cut":
        array.write_bytes(array.read_bytes()[:-50])
    elif spoil == "one record less":
        records.write_text("".join(lines[:-1]))
    else:
        records.write_text("".join(lines[:-1]) + json.dumps({"texts": ["a"]})[:-3] + "\n")
    with pytest.raises(LdmError, match="pack the shards"):
        open_packed(tmp_path, 8)
    pack(tmp_path, tmp_path, 8)  # a broken set is not taken for a current one
    assert len(open_packed(tmp_path, 8)[1]) == 5

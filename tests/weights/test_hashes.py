"""Hashes: against the definitions that other programs follow, on files that the safetensors library wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ldm.weights.hashes import FullHashes, check_full, check_short, full_hashes, old_short_hash
from ldm.weights.io import read_header

TENSORS = {
    "z.lora_up.weight": torch.arange(300_000, dtype=torch.float32),
    "a.lora_up.weight": torch.arange(100_000, dtype=torch.float16) / 7,
    "m.alpha": torch.tensor(8.0),
}
"""1.4 MB of two dtypes, so that the order in the file is not the order of the names."""

SS = {"ss_network_dim": "16", "ss_training_comment": 'quotes " and \\ and \n, Ärger 🍎', "ss_tag_frequency": "{}"}


def after_header(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def kohya_hashes(metadata: dict[str, str]) -> dict[str, str]:
    """The two hashes as kohya's trainer computes them: of the file as bytes, with the `ss_*` metadata alone."""
    content = save(TENSORS, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    return {
        "sshs_model_hash": hashlib.sha256(after_header(content)).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def test_each_hash_is_over_its_own_bytes(path: Path) -> None:
    save_file(TENSORS, path, {"format": "pt"})
    content = path.read_bytes()
    assert old_short_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    full = full_hashes(read_header(path))
    assert full == FullHashes(
        hashlib.sha256(content).hexdigest(),
        hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest(),
    )
    assert (full.auto_v2, full.auto_v3) == (full.sha256[:10], full.numbers[:12])


def test_a_small_file_has_an_old_hash_too(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert old_short_hash(tmp_path / "x") == "e3b0c442"  # of nothing


@pytest.mark.parametrize("more", [{}, {"modelspec.title": "x" * 1000, "z": "1"}])
def test_what_kohya_writes_is_right(path: Path, more: dict[str, str]) -> None:
    metadata = SS | more | kohya_hashes(SS)
    save_file(TENSORS, path, metadata)
    header = read_header(path)
    assert check_short(header) == {"sshs_legacy_hash": True}
    assert check_full(header, full_hashes(header)) == {"sshs_model_hash": True}


def test_a_changed_number_is_noticed(path: Path) -> None:
    tensors = TENSORS | {"z.lora_up.weight": TENSORS["z.lora_up.weight"] + 1}
    save_file(tensors, path, SS | kohya_hashes(SS))
    header = read_header(path)
    assert check_short(header) == {"sshs_legacy_hash": False}
    assert check_full(header, full_hashes(header)) == {"sshs_model_hash": False}


def test_a_window_in_the_metadata_is_not_judged(path: Path) -> None:
    metadata = {"ss_tag_frequency": json.dumps({"x" * 1_100_000: 1})}
    save_file(TENSORS, path, metadata | {"sshs_legacy_hash": "00000000"})
    assert check_short(read_header(path)) == {}


def test_no_claim_no_verdict(path: Path) -> None:
    save_file(TENSORS, path)
    header = read_header(path)
    assert check_short(header) == {}
    assert check_full(header, full_hashes(header)) == {}


def test_a_modelspec_hash_in_either_order(path: Path) -> None:
    save_file(TENSORS, path)
    in_file = hashlib.sha256(after_header(path.read_bytes())).hexdigest()
    tensors = load_file(path)
    by_name = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    assert in_file != by_name
    for said, right in ((f"0x{in_file}", True), (in_file.upper(), True), (by_name, True), ("0" * 64, False)):
        save_file(TENSORS, path, {"modelspec.hash_sha256": said})
        header = read_header(path)
        assert check_full(header, full_hashes(header)) == {"modelspec.hash_sha256": right}

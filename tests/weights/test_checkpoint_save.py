"""Files that we write: as the library reads them, with a true hash, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, sdxl_refiner, small
from ldm.weights.atomic import replacing
from ldm.weights.hashes import MODELSPEC_HASH
from ldm.weights.io import read_header
from ldm.weights.save import modelspec, write_tensors

TENSORS = {
    "half": torch.tensor([[1.0, -2.0, 3.0]]).half(),
    "brain": torch.tensor([0.1, float("inf")]).bfloat16(),
    "single": torch.arange(12.0).reshape(3, 4).t(),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "whole": torch.arange(5),
    "bits": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
    "eight": torch.tensor([1.0, 2.0]).to(torch.float8_e5m2),
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"author": 'Jürgen "J"', "note": "two\nlines"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == 'Jürgen "J"'
    assert metadata["note"] == "two\nlines"


def test_numbers_are_aligned_and_hashed_as_modelspec_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {})
    header, content = read_header(path), path.read_bytes()
    assert header.metadata[MODELSPEC_HASH] == "0x" + hashlib.sha256(content[header.data_start :]).hexdigest()
    assert header.data_start % 8 == 0
    for name, tensor in header.tensors.items():
        assert tensor.begin % TENSORS[name].itemsize == 0


def test_a_dtype_applies_to_floating_point_tensors_only(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {}, dtype=torch.float16)
    loaded = load_file(path)
    for name, tensor in TENSORS.items():
        assert same(loaded[name], tensor.half() if tensor.is_floating_point() else tensor)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write_tensors(first, TENSORS, {"a": "b"})
    write_tensors(second, dict(reversed(TENSORS.items())), {"a": "b"})
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_rights_follow_the_umask(umask: int, tmp_path: Path) -> None:
    previous = os.umask(umask)
    try:
        write_tensors(tmp_path / "x", TENSORS, {})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(LdmError, match=r"x\.safetensors: cannot be written: .*nothing was changed"):
            write_tensors(path, {"big": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_until_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "absent" / "x", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(LdmError, match="cannot be written"):
            write_tensors(path, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("config", "architecture", "prediction"),
    [
        (sd1(), "stable-diffusion-v1", "epsilon"),
        (sd1(in_channels=9), "stable-diffusion-v1-inpainting", "epsilon"),
        (sd2(), "stable-diffusion-v2-512", "epsilon"),
        (sd2("v"), "stable-diffusion-v2-768-v", "v"),
        (sd2(in_channels=9), "stable-diffusion-v2-inpainting", "epsilon"),
        (sd2(in_channels=5), "stable-diffusion-v2-depth", "epsilon"),
        (sdxl(), "stable-diffusion-xl-v1-base", "epsilon"),
        (sdxl_refiner(), "stable-diffusion-xl-v1-refiner", "epsilon"),
        (sd_x4_upscaler(), "stable-diffusion-v2-x4-upscaler", "v"),
        (small(), "latent-diffusion", "v"),
        (replace(sd1(), prediction="x0"), "stable-diffusion-v1", None),
    ],
)
def test_modelspec(config: SystemConfig, architecture: str, prediction: str | None) -> None:
    entries = modelspec(config, "a title")
    assert entries["modelspec.sai_model_spec"] == "1.0.1"
    assert entries["modelspec.architecture"] == architecture
    assert entries["modelspec.title"] == "a title"
    assert entries["modelspec.implementation"]
    assert entries["modelspec.resolution"] == f"{config.size}x{config.size}"
    assert entries.get("modelspec.prediction_type") == prediction


def test_saving_over_the_file_that_is_mapped_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {})
    mapped = load_file(path)
    write_tensors(path, {name: tensor for name, tensor in mapped.items() if name != "whole"}, {})
    assert all(same(tensor, TENSORS[name]) for name, tensor in mapped.items())
    assert "whole" not in load_file(path)

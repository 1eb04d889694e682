"""What a pickle names: files of torch.save, and attacks. Nothing in them ever runs."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.errors import LdmError
from ldm.weights.doctor import pickle_scan
from ldm.weights.doctor.pickle_scan import UNKNOWN, scan_pickle

STATE = {
    "cond_stage_model.transformer.w": torch.ones(2, 3),
    "b": torch.ones(2, dtype=torch.bfloat16),
    "p": torch.nn.Parameter(torch.ones(3)),
}


class Hostile:
    """Unpickling it would leave a file named canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_harmless(here: Path, zipped: bool) -> None:
    value = {
        "state_dict": collections.OrderedDict(STATE),
        "global_step": 5,
        "lr": np.float64(0.1),
        "shape": torch.Size([1]),
    }
    torch.save(value, here / "x.ckpt", _use_new_zipfile_serialization=zipped)
    scan = scan_pickle(here / "x.ckpt")
    assert (scan.dangerous, scan.foreign, scan.complete) == ((), (), True)
    assert {*STATE, "state_dict", "global_step"} <= set(scan.keys)
    assert "none found" in scan.verdict


@pytest.mark.parametrize("zipped", [True, False])
def test_an_attack_is_named(here: Path, zipped: bool) -> None:
    torch.save({**STATE, "x": Hostile()}, here / "x.ckpt", _use_new_zipfile_serialization=zipped)
    scan = scan_pickle(here / "x.ckpt")
    assert scan.dangerous == ("posix.system",)
    assert scan.verdict == "DANGEROUS: loading it runs posix.system; delete it"
    assert not (here / "canary").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_understood(here: Path, protocol: int) -> None:
    (here / "x.pt").write_bytes(pickle.dumps([1, "text", Hostile(), collections.OrderedDict(a=1)], protocol))
    assert scan_pickle(here / "x.pt").dangerous == ("posix.system",)
    (here / "x.pt").write_bytes(pickle.dumps(["text", collections.OrderedDict(a=1), {1}, 2.5], protocol))
    scan = scan_pickle(here / "x.pt")
    assert (scan.dangerous, scan.foreign, scan.complete) == ((), (), True)


def test_classes_of_other_packages_are_no_attack(here: Path) -> None:
    torch.save({**STATE, "args": argparse.Namespace(lr=1)}, here / "x.ckpt")
    scan = scan_pickle(here / "x.ckpt")
    assert (scan.dangerous, scan.foreign) == ((), ("argparse.Namespace",))
    assert "argparse.Namespace" in scan.verdict


HIDDEN = {
    "names on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "names kept and fetched": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94K\x010h\x00h\x01\x93.",
    "decoys taken off again": b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93.",
    "decoys below a mark": b"\x80\x04\x8c\x02os\x8c\x06system(\x8c\x0bcollections\x8c\x0bOrderedDict1\x93.",
    "an instance": b"(S'touch canary'\nios\nsystem\n.",
    "an extension code": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_names_are_found_or_called_dangerous(here: Path, case: str) -> None:
    (here / "x.pt").write_bytes(HIDDEN[case])
    (name,) = scan_pickle(here / "x.pt").dangerous
    assert name in ("os.system", UNKNOWN)


def test_the_second_pickle_of_an_old_file_counts(here: Path) -> None:
    first = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    (here / "x.pt").write_bytes(first + pickle.dumps(1001, 2) + pickle.dumps(Hostile(), 2))
    assert scan_pickle(here / "x.pt").dangerous == ("posix.system",)


def test_a_cut_pickle_is_suspicious(here: Path) -> None:
    content = pickle.dumps({"a": "b", "c": collections.OrderedDict(a=1)})
    (here / "x.pt").write_bytes(content[:-2])
    assert "suspicious" in scan_pickle(here / "x.pt").verdict


def test_bombs_are_not_inflated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_scan, "MAX_STEPS", 10_000)
    with zipfile.ZipFile(here / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x8c\x01a" + b"]" * 40_000_000)
    assert not scan_pickle(here / "x.ckpt").complete
    (here / "x.pt").write_bytes(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x")  # text of 1 TB, it says
    with pytest.raises(LdmError, match="no pickle"):
        scan_pickle(here / "x.pt")


def test_what_is_no_pickle(here: Path) -> None:
    (here / "x.ckpt").write_bytes(b"<html>")
    with pytest.raises(LdmError, match="no PyTorch checkpoint"):
        scan_pickle(here / "x.ckpt")
    with zipfile.ZipFile(here / "x.ckpt", "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(LdmError, match=r"there is no \.pkl in it"):
        scan_pickle(here / "x.ckpt")
    torch.save(STATE, here / "x.ckpt")
    content = (here / "x.ckpt").read_bytes()
    (here / "x.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(LdmError, match=r"x\.ckpt"):
        scan_pickle(here / "x.ckpt")


QUIET = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUIET
@given(where=st.integers(0, 10_000), byte=st.integers(0, 255), zipped=st.booleans())
def test_changed_bytes_never_crash(here: Path, where: int, byte: int, zipped: bool) -> None:
    content = bytearray(_saved(here, zipped))
    content[where % len(content)] = byte
    (here / "x.pt").write_bytes(content)
    try:
        scan_pickle(here / "x.pt")
    except LdmError as error:
        assert "\n" not in str(error)


def _saved(here: Path, zipped: bool) -> bytes:
    path = here / f"sound-{zipped}.pt"
    if not path.exists():
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()

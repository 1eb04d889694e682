"""Headers: files of the safetensors library are read as it reads them; every broken file gets its one line."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.errors import LdmError
from ldm.weights.io import MAX_METADATA, MAX_TENSORS, printable, read_header, read_tensors

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.tensor([True, False, True]),
    "f": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
}


def container(header: Any, data: bytes = b"") -> bytes:
    """A .safetensors file with this header (JSON-able, or the bytes themselves)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def message_of(path: Path) -> str:
    """What `read_header` has against a file."""
    with pytest.raises(LdmError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(printable(str(path)))
    return message


def test_reads_what_the_library_wrote(valid: Path) -> None:
    header = read_header(valid)
    assert header.metadata == {"format": "pt"}
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in read_tensors(header, TENSORS):
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor.view(torch.uint8) if tensor.ndim else tensor, bits(TENSORS[name]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.ndim else tensor


def test_reads_only_the_named_tensors_in_the_order_of_the_file(valid: Path) -> None:
    header = read_header(valid)
    assert [name for name, _ in read_tensors(header, ["b.bias", "c"])] == ["c", "b.bias"]


def test_the_mapping_is_private(valid: Path) -> None:
    before = valid.read_bytes()
    for _, tensor in read_tensors(read_header(valid), ["a.weight"]):
        tensor.fill_(9)
    assert valid.read_bytes() == before
    for _, tensor in read_tensors(read_header(valid), ["a.weight"]):
        assert torch.equal(tensor, TENSORS["a.weight"])


def test_numbers_need_no_alignment(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"u": entry("U8", [3], [0, 3]), "f": entry("F32", [2], [3, 11])}
    path.write_bytes(container(header, b"abc" + struct.pack("<2f", 1.5, 2.5)))
    assert dict(read_tensors(read_header(path), ["f"]))["f"].tolist() == [1.5, 2.5]


def test_a_file_changed_after_its_header_was_read_is_refused(valid: Path) -> None:
    header = read_header(valid)
    os.utime(valid, ns=(0, 0))
    with pytest.raises(LdmError, match="changed while it was being read"):
        list(read_tensors(header, ["c"]))
    valid.unlink()
    with pytest.raises(LdmError, match="no such file"):
        list(read_tensors(header, ["c"]))


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, ("touch canary",)


def torch_zip() -> bytes:
    stream = BytesIO()
    torch.save({"weight": torch.ones(2)}, stream)
    return stream.getvalue()


def torch_legacy() -> bytes:
    stream = BytesIO()
    torch.save({"weight": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def plain_zip() -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x", "y")
    return stream.getvalue()


MANY = range(MAX_TENSORS + 1)

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "incomplete: have 7 bytes"),
    "eight bytes": (struct.pack("<Q", 100), "incomplete: have 8 bytes"),
    "html": (b"<!DOCTYPE html>\n<html><body>404 Not Found", "looks like HTML"),
    "html, spaced": (b"\n\n <HTML lang=en>", "looks like HTML"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "torch zip": (torch_zip(), "pickle"),
    "torch legacy": (torch_legacy(), "pickle"),
    "plain zip": (plain_zip(), "zip archive"),
    **{f"pickle {p}": (pickle.dumps(Hostile(), p), "pickle") for p in range(2, 6)},
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    "text": (b"Repository not found", "plain text ('Repository not found')"),
    "json text": (b'{"error": "Access to model x is restricted"}', "plain text"),
    "zeros": (bytes(4096), "zeros only"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG picture"),
    "noise": (bytes(range(255, 127, -1)), "not a .safetensors file"),
    "header 100 000 001": (struct.pack("<Q", 100_000_001) + b"{" + bytes(64), "100000001 bytes, at most 100000000"),
    "header past the end": (struct.pack("<Q", 1000) + b'{"a":1}', "its header alone needs 1008"),
    "header of length 0": (struct.pack("<Q", 0) + b"xxxx", "no JSON object"),
    "not utf-8": (container(b'{"\xff\xfe":1}'), "utf-8"),
    "json cut": (container(b'{"a": {"dtype": "F32"'), "delimiter"),
    "header []": (container(b"[]"), "no JSON object"),
    "header null": (container(b"null"), "no JSON object"),
    "nan": (container(b'{"a": NaN}'), "NaN is not JSON"),
    "nested deeply": (container(b'{"a":' * 100_000), "recursion"),
    "digits": (container(b'{"a":' + b"1" * 5000 + b"}"), "integer string conversion"),
    "entry no object": (container({"a": 1}), "must have dtype, shape and data_offsets"),
    "extra field": (container({"a": entry(code="x")}, bytes(8)), "nothing else"),
    "duplicate": (container(b'{"a":{},"a":{}}'), "'a' stands there twice"),
    "duplicate inside": (container(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' stands there twice"),
    "name with path": (container({"../../etc/passwd": entry()}, bytes(8)), "not a tensor name"),
    "name with escape": (container({"a\x1b[2J": entry()}, bytes(8)), "not a tensor name"),
    "name not Unicode": (container(b'{"a\\ud800": {}}'), "not a tensor name"),
    "name empty": (container({"": entry()}, bytes(8)), "not a tensor name"),
    "name long": (container({"a" * 300: entry()}, bytes(8)), "not a tensor name"),
    "dtype F33": (container({"a": entry("F33")}, bytes(8)), "dtype F33"),
    "dtype F4": (container({"a": entry("F4", [16], [0, 8])}, bytes(8)), "dtype F4"),
    "dtype list": (container({"a": entry([1])}, bytes(8)), "dtype"),  # type: ignore[arg-type]
    "shape text": (container({"a": entry(shape="2")}, bytes(8)), "needs a shape"),
    "shape negative": (container({"a": entry(shape=[-2])}, bytes(8)), "none negative"),
    "shape true": (container({"a": entry(shape=[True, 2])}, bytes(8)), "needs a shape"),
    "shape float": (container({"a": entry(shape=[2.0])}, bytes(8)), "needs a shape"),
    "shape huge": (container({"a": entry(shape=[2**62] * 8)}, bytes(8)), "takes"),
    "rank 1000": (container({"a": entry(shape=[1] * 1000, offsets=[0, 4])}, bytes(4)), "at most 8"),
    "offsets negative": (container({"a": entry(offsets=[-8, 0])}, bytes(8)), "none negative"),
    "offsets reversed": (container({"a": entry(offsets=[8, 0])}, bytes(8)), "give -8"),
    "offsets three": (container({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "two data_offsets"),
    "shape against offsets": (container({"a": entry(shape=[3])}, bytes(8)), "takes 12 bytes, its offsets give 8"),
    "overlap": (container({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "b overlaps a"),
    "same place twice": (container({"a": entry(), "b": entry()}, bytes(8)), "b overlaps a"),
    "hole": (container({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "b leaves a gap after a"),
    "hole at the start": (container({"a": entry(offsets=[4, 12])}, bytes(12)), "leaves a gap after the header"),
    "trailing bytes": (container({"a": entry()}, bytes(8) + b"PK"), "2 bytes follow the last tensor"),
    "metadata nested": (container({"__metadata__": {"a": {"b": "c"}}}), "strings to strings"),
    "metadata int": (container({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata list": (container({"__metadata__": ["a"]}), "strings to strings"),
    "metadata 10 MB": (container({"__metadata__": {"a": "x" * 10_000_000}}), f"longer than {MAX_METADATA}"),
    "too many": (container({f"t{i}": entry("U8", [0], [0, 0]) for i in MANY}), "too many tensors: 20001"),
    "too many, disguised": (
        container(b"{" + b",".join(b'"t%d":{"data\\u005foffsets":[]}' % i for i in MANY) + b"}"),
        "too many tensors: 20001",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert expected in message_of(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content", [torch_zip(), torch_legacy(), pickle.dumps(Hostile(), 0), pickle.dumps(Hostile(), 1)]
)
def test_pickles_are_not_read(suffix: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    message = message_of(path)
    assert "pickle" in message
    assert "--allow-pickle" in message
    assert "ldm convert" in message
    assert not (tmp_path / "canary").exists()


def test_what_a_file_holds_decides_and_not_its_ending(valid: Path) -> None:
    assert read_header(valid.rename(valid.with_suffix(".ckpt"))).shapes["a.weight"] == (2, 3)


def test_interrupted_downloads_are_told_to_the_byte(valid: Path) -> None:
    content = valid.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for size in {*range(1, len(content)), len(content) // 2, len(content) - 2}:
        valid.write_bytes(content[:size])
        message = message_of(valid)
        assert "incomplete" in message
        assert f"have {size} " in message
        if size >= header_end:
            assert f"have {size} of {len(content)} bytes" in message


def test_a_header_of_90_mb_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(b'{"a":{"data_offsets":[0,0]}' * 2_000_000 + b"}"))
    monkeypatch.setattr(json, "loads", lambda *a, **k: pytest.fail("parsed"))
    assert "too many tensors: 2000000" in message_of(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "is a folder" in message_of(tmp_path)
    assert "no such file" in message_of(tmp_path / "absent.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to("absent.safetensors")
    assert "is a link to absent.safetensors, which does not exist" in message_of(link)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    assert "symbolic links" in message_of(loop)
    assert "too long" in message_of(tmp_path / ("x" * 300))
    assert "null" in message_of(Path("a\0b"))
    assert "a\\nb" in message_of(tmp_path / "a\nb")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a POSIX system's files")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe.safetensors"
    os.mkfifo(fifo)
    assert "pipe or a device" in message_of(fifo)
    assert "pipe or a device" in message_of(Path("/dev/zero"))


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="a POSIX system's rights")
def test_a_file_without_permission(valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(valid.parent)  # where we stand, closed folders on the way there do not matter
    valid.parent.chmod(0o711)
    valid.chmod(0o644)
    with without_root():
        assert read_header(valid.name).shapes["a.weight"] == (2, 3)
    valid.chmod(0)
    with without_root():
        assert "no permission" in message_of(Path(valid.name))


@contextmanager
def without_root() -> Iterator[None]:
    """Root may read everything: be nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["with space.safetensors", "Äpfel-日本-🍎.safetensors", "x" * 240 + ".safetensors"])
def test_any_name_is_fine(name: str, valid: Path) -> None:
    header = read_header(valid.rename(valid.with_name(name)))
    assert dict(read_tensors(header, ["c"]))["c"].item() == 7


def test_a_link_to_a_file_is_fine(valid: Path) -> None:
    link = valid.with_name("link.safetensors")
    link.symlink_to(valid.name)
    assert dict(read_tensors(read_header(link), ["c"]))["c"].item() == 7


def test_printable_hides_no_letter_and_shows_no_control() -> None:
    assert printable("Äpfel 🍎") == "Äpfel 🍎"
    assert printable("a\x1b[2J\n\ud800\u202e") == "a\\x1b[2J\\n\\ud800\\u202e"


QUICK = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def library_reads(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(str(path), framework="pt") as file:
        return {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118


def accepted_or_refused(path: Path) -> None:
    """Either our one error, or the library agrees that the file is sound and says the same of it."""
    try:
        header = read_header(path)
    except LdmError as error:
        assert "\n" not in str(error)
    else:
        assert library_reads(path) == header.shapes


@QUICK
@given(where=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 400))
def test_mutated_bytes_never_crash(where: int, byte: int, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    content[where % len(content)] = byte
    path.write_bytes(content[: len(content) - max(0, cut - 200)])
    accepted_or_refused(path)


numbers = st.integers(-2, 12) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, True, 1.0, None, "1"])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "BF16", "F33", "", 1, None]),
        "shape": st.lists(numbers, max_size=9) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | st.tuples(st.just(0), numbers),
        "more": numbers,
    },
)
sound = st.integers(0, 3).map(lambda n: entry("F32", [n], [0, 4 * n]))
headers = st.dictionaries(
    st.sampled_from(["a", "b.weight", "__metadata__", "../c"]) | st.text(max_size=5),
    entries | sound | numbers,
    max_size=3,
)


@QUICK
@given(header=headers, size=st.integers(0, 64))
def test_invented_headers_never_crash(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(header, bytes(size)))
    accepted_or_refused(path)

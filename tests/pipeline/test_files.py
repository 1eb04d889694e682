"""Names that never collide, writes that are whole or not there, reads that never hang."""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path

import pytest

from ldm.errors import LdmError
from ldm.pipeline import files
from ldm.pipeline.files import check_output, output_path, read_file, stem_of, write_new

RESERVED = {"con", "nul", "aux", "prn", "com1", "lpt1"}  # names that Windows keeps, with any ending


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a red apple", "a-red-apple"),
        ("A Red, Apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\evil\\x::$DATA", "c-evil-x-data"),
        ("", "picture"),
        (" .- ", "picture"),
        ("🍎🍏", "picture"),
        ("émile à 東京", "émile-à-東京"),
        ("ﬁne ２", "fine-2"),
        ("a\nb\tc\x1b[31m", "a-b-c-31m"),
        ("__init__", "init"),
    ],
)
def test_stem(prompt, stem):
    assert stem_of(prompt) == stem


@pytest.mark.parametrize(
    "prompt", ["x" * 300, "字" * 300, "CON", "nul", "a/b" * 200, "-rf", "~", ".hidden", "%00", "com1."]
)
def test_names_are_safe(prompt, tmp_path):
    path = output_path(tmp_path, prompt, 42)
    assert path.parent == tmp_path and path.suffix == ".png" and path.stem.endswith("-42")
    assert len(path.name.encode()) <= 128 and re.fullmatch(r"[^\W_][\w-]*", path.stem)
    assert path.name.split(".")[0] not in RESERVED
    assert write_new(path, b"x").read_bytes() == b"x"


def test_a_named_file_is_taken_as_it_is(tmp_path):
    assert output_path(tmp_path / "My File.PNG", "a", 1) == tmp_path / "My File.PNG"


def test_nothing_is_overwritten(tmp_path):
    names = [write_new(tmp_path / "new" / "a.png", bytes([i])).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / "new" / name).read_bytes() for name in names] == [b"\0", b"\1", b"\2"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(names)


def test_many_writers_of_one_name(tmp_path):
    threads = [threading.Thread(target=write_new, args=(tmp_path / "a.png", bytes([i]) * 100)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [bytes([i]) * 100 for i in range(16)]


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        mode = write_new(tmp_path / "a.png", b"x").stat().st_mode
    finally:
        os.umask(before)
    assert stat.S_IMODE(mode) == 0o640


def test_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert [write_new(tmp_path / "a.png", b"x").name for _ in range(2)] == ["a.png", "a-2.png"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_nothing_half_written(call, error, tmp_path, monkeypatch):
    """Whatever fails on the way, the folder is as before."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    if call == "link":
        monkeypatch.setattr(os, "replace", fail)
    wanted = LdmError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="a.png: cannot be written \\(no space left" if wanted is LdmError else None):
        write_new(tmp_path / "a.png", b"x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_data_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda a, b: (calls.append("link"), link(a, b)))
    write_new(tmp_path / "a.png", b"x")
    assert calls == ["fsync", "link", "fsync"]


def test_outputs_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "folder.png").mkdir()
    for output, message in [
        (Path("-"), "found -"),
        (file, "expected a name that ends in .png, .jpg or .webp, or a folder"),
        (tmp_path / "a.gif", "expected a name that ends in .png, .jpg or .webp, or a folder"),
        (tmp_path / "folder.png", "is a folder"),
        (file / "below", "is not a folder"),
        (file / "a.png", "is not a folder"),
        (tmp_path / ("x" * 300), "cannot be written \\(file name too long"),
        (tmp_path / ("x" * 300) / "a.png", "cannot be written \\(file name too long"),
    ]:
        with pytest.raises(LdmError, match=message):
            check_output(output)
    for output in (tmp_path, tmp_path / "new" / "er", tmp_path / "new" / "a.png", Path("a.png"), Path()):
        check_output(output)


def test_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(LdmError, match="is not writable"):
        check_output(tmp_path)


def test_reading(tmp_path):
    path = tmp_path / "ä b.txt"
    path.write_bytes(b"12345")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_file(path, 5) == b"12345"
    for wrong, message in [
        (path, "found more than 0 MiB"),
        (tmp_path, "found a folder"),
        (tmp_path / "dangling", "no such file"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read \\(file name too long"),
    ]:
        with pytest.raises(LdmError, match=message):
            read_file(wrong, 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a POSIX system's files")
def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(LdmError, match="found a device or pipe"):
            read_file(wrong, 4)


def test_temporary_names_are_hidden(tmp_path, monkeypatch):
    seen: list[str] = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: (seen.append(Path(a).name), link(a, b)))
    write_new(tmp_path / ("x" * 200 + ".png"), b"x")
    assert re.fullmatch(r"\.ldm-[0-9a-f]{16}\.tmp", seen[0])
    assert files.names_file(Path("x.PNG")) and not files.names_file(Path("x"))

"""{a|b} and __name__: what is picked, from where, and that it always ends."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import LdmError
from ldm.pipeline.text.wildcards import MAX_TEXT, expand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("wildcards")
    folder = top / "lists"
    (folder / "animals" / "air").mkdir(parents=True)
    (folder / "colour.txt").write_bytes("\ufeff# colours\r\nred\r\n\r\n  blue \r\n#green\r\n".encode())
    (folder / "animals" / "air" / "birds.txt").write_text("owl\n{white|__colour__} jay\n")
    (folder / "loop.txt").write_text("a __loop__\n")
    (folder / "grow.txt").write_text("__grow__" + "x" * 5000 + "\n")
    (folder / "none.txt").write_text("# nothing\n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (top / "secret.txt").write_text("secret\n")
    (folder / "link.txt").symlink_to(top / "secret.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "inner.txt").symlink_to(folder / "colour.txt")
    return folder


def seen(text: str, folders: tuple[Path, ...] = (), count: int = 400) -> Counter[str]:
    return Counter(expand(text, seed, folders) for seed in range(count))


def test_one_of_each_is_picked():
    counts = seen("a {red|green|} cat")
    assert set(counts) == {"a red cat", "a green cat", "a  cat"}
    assert min(counts.values()) > 90  # a third of 400; five deviations are 47


def test_weights():
    counts = seen("{1::a|3::b|0::c}")
    assert set(counts) == {"a", "b"} and 60 < counts["a"] < 140
    assert set(seen("{0::a|0::b}", count=40)) == {"a", "b"}
    assert set(seen("{x::a|b}", count=40)) == {"x::a", "b"}
    assert set(seen("{-1::a|1e308::b}", count=40)) == {"-1::a", "1e308::b"}


def test_several_are_picked_once_each():
    assert set(seen("{2$$a|b|c}")) == {"a, b", "a, c", "b, a", "b, c", "c, a", "c, b"}
    assert {frozenset(text.split(", ")) for text in seen("{9$$a|b}", count=40)} == {frozenset("ab")}
    assert set(seen("{0$$a|b}", count=9)) == {""}
    assert set(seen("{2$$0::a|b|c}")) == {"b, c", "c, b"}


def test_braces_in_braces():
    assert set(seen("{a|{b|{c|d}} e}")) == {"a", "b e", "c e", "d e"}
    assert set(seen("{a {x}|b}", count=40)) == {"a {x}", "b"}


@pytest.mark.parametrize(
    "text", ["", "a {plain} prompt", "{", "}{", "{a|b", "a|b}", "______", "__init", "a__b", "snake_case_", "__ a __"]
)
def test_what_is_none_stays(text):
    assert expand(text, 1) == text


def test_files(folder):
    assert set(seen("__colour__!", (folder,), 40)) == {"red!", "blue!"}
    assert set(seen("__colour____colour__", (folder,), 60)) == {"redred", "redblue", "bluered", "blueblue"}
    assert set(seen("__animals/air/birds__", (folder,), 100)) == {"owl", "white jay", "red jay", "blue jay"}
    assert set(seen("{__colour__|none}", (folder / "animals", folder), 60)) == {"red", "blue", "none"}
    assert set(seen("__inner__", (folder,), 40)) == {"red", "blue"}  # a link that stays inside


def test_the_first_folder_counts(folder, tmp_path):
    (tmp_path / "colour.txt").write_text("grey")
    assert set(seen("__colour__", (tmp_path, folder), 20)) == {"grey"}


def test_a_seed_is_a_text(folder):
    text = "{a|b|c|d} __colour__ {2$$x|y|z}"
    assert [expand(text, seed, [folder]) for seed in range(20)] == [expand(text, seed, [folder]) for seed in range(20)]
    assert len({expand(text, seed, [folder]) for seed in range(20)}) > 5


def test_files_that_are_not_picked_are_not_asked_for():
    assert expand("{a|0::__missing__}", 3) == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__missing__", r"__missing__: there is no missing.txt in '.*lists'; see --wildcards"),
        ("__animals__", "there is no animals.txt"),
        ("__link__", "there is no link.txt"),
        ("__circle__", "there is no circle.txt"),
        (f"__{'n' * 300}__", "there is no nnn"),
        ("__none__", "none.txt': found no lines"),
        ("__binary__", "binary.txt': found no text"),
        ("__loop__", "expected an end"),
        ("__grow__", "expected an end"),
    ],
)
def test_bad_files(folder, text, message):
    with pytest.raises(LdmError, match=message) as caught:
        expand(text, 0, [folder])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("text", ["__../secret__", "__/etc/passwd__", "__a/../../secret__", "__..__", "__a//b__"])
def test_names_lead_nowhere_else(folder, text):
    assert expand(text, 0, [folder]) == text


def test_without_folders():
    with pytest.raises(LdmError, match="--wildcards DIR"):
        expand("a __colour__", 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(LdmError, match=r"there is no pipe\.txt"):
        expand("__pipe__", 0, [tmp_path])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from([*"{}|_$:/.a1", "2$$", "::", "0.5::", "__", "__colour__"]), max_size=40).map("".join),
    seed=st.integers(0, 2**63),
)
def test_nothing_breaks_it(folder, text, seed):
    try:
        assert len(expand(text, seed, [folder])) <= MAX_TEXT
    except LdmError as error:
        assert "there is no" in str(error)


@pytest.mark.parametrize(
    "text", ["{" * 4000, "{a|" * 1300, "{a|" * 900 + "}" * 900, "_" * 4000, "__a" * 1300, "|" * 4000]
)
def test_long_texts_end(folder, text):
    begun = time.process_time()
    try:
        expand(text, 1, [folder])
    except LdmError as error:
        assert "there is no" in str(error)
    assert time.process_time() - begun < 2

"""The language of prompts: hand-worked examples of each program's rules, and that no text breaks or slows it."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import pytest
from compel.prompt_parser import Fragment, PromptParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.errors import LdmError
from ldm.pipeline.text.prompt import Emphasis, NamedAdapter, adapters_in, alternatives, schedule_of
from ldm.pipeline.text.prompt_weights import MAX_WEIGHT, Piece, parse_weights, weights_text

SYNTAXES: tuple[Emphasis, ...] = ("a1111", "no-norm", "comfy", "compel", "ignore")
SIGNS = st.sampled_from(
    [*'()[]\\:|+-.," ab1é\n', "BREAK", " BREAK ", "AND", ":1.3)", ")1.2", ":.5]", "[a:b:2]", "++", "<lora:x:", ">"]
)
TEXTS = st.lists(SIGNS, max_size=30).map("".join) | st.text(max_size=60)


def weights(text: str, syntax: Emphasis = "a1111") -> list[list[tuple[str, float]]]:
    return [[(piece.text, round(piece.weight, 6)) for piece in chunk] for chunk in parse_weights(text, syntax)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an", 1), ("important", 1.1), ("word", 1)]),
        ("an [unimportant] word", [("an", 1), ("unimportant", 0.909091), ("word", 1)]),
        ("[[x]]", [("x", 0.826446)]),
        ("a (((farm))) house", [("a", 1), ("farm", 1.331), ("house", 1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("((a:1.3) b:2)", [("a", 2.6), ("b", 2)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:0)", [("a", 0)]),
        ("[a:1.3]", [("a:1.3", 0.909091)]),  # a number is for round brackets
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),  # and is one
        ("a:1.3)", [("a:1.3)", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced)", [("unbalanced)", 1)]),
        ("(a [b) c]", [("a", 1.1), ("b", 1.0), ("c", 0.909091)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a\\b c\d", [(r"a\b cd", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(two) (words)", [("two words", 1.1)]),
        ("()", []),
        ("", []),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a", 1),
                ("house", 1.573),
                ("on", 1),
                ("a", 1.1),
                ("hill", 0.55),
                (", sun,", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_brackets_as_in_a1111(text, expected):
    assert weights(text) == weights(text, "ignore") == weights(text, "no-norm") == [expected]
    assert weights(text, "literal") == [[(text, 1)] if text else []]


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a BREAK b", ["a", "b"]),
        ("a\nBREAK\nb", ["a", "b"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK", ["a"]),  # nothing follows, so no chunk is begun
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("a BREAK BREAK", ["a", ""]),
        ("BREAKFAST aBREAK break", ["BREAKFAST aBREAK break"]),
        (r"a BREA\K b", ["a BREAK b"]),
    ],
)
def test_break(text, chunks):
    assert [" ".join(piece.text for piece in chunk) for chunk in parse_weights(text)] == chunks


def test_brackets_go_on_behind_a_break():
    assert weights("(a BREAK b:1.5)") == [[("a", 1.5)], [("b", 1.5)]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (b)", [("a", 1), ("b", 1.1)]),
        ("((b))", [("b", 1.21)]),
        ("((a:1.3) b:2)", [("a", 1.3), ("b", 2)]),  # the inner number replaces
        ("((a):1.5)", [("a", 1.65)]),  # brackets without a number multiply
        ("(a:1e1)", [("a", 10)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
        ("[a] BREAK b", [("[a] BREAK b", 1)]),
        (r"\(a\) \[b", [(r"(a) \[b", 1)]),
    ],
)
def test_brackets_as_in_comfy(text, expected):
    assert weights(text, "comfy") == [expected]


COMPEL = [
    "a cat playing with a ball++ in the forest",
    "a tall thin man (picking apricots)-",
    "a tall thin man (picking apricots+)++",
    "a tall thin man (picking (apricots)1.3)1.1",
    "a (red)0.5 house--",
    "a well-known man- a-b",
    "one (two (three)++ four)- five+",
    "ball++, tree-- , (sun)1.5.",
    r"a \(real\) man+",
    "+ - a",
]


@pytest.mark.parametrize("text", COMPEL)
def test_signs_as_in_compel(text):
    """compel's own parser says the same of every letter; it has spaces at other places."""
    (flat,) = PromptParser().parse_conjunction(text).prompts
    assert all(isinstance(fragment, Fragment) for fragment in flat.children)
    theirs = [(c, fragment.weight) for fragment in flat.children for c in fragment.text if not c.isspace()]
    ours = [(c, piece.weight) for piece in parse_weights(text, "compel")[0] for c in piece.text if not c.isspace()]
    assert [c for c, _ in ours] == [c for c, _ in theirs]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs])


def test_broken_compel_is_text():
    assert weights("(a b+", "compel") == [[("(a", 1), ("b", 1.1)]]
    assert weights("a)++ b", "compel") == [[("a)++ b", 1)]]


@pytest.mark.parametrize("syntax", SYNTAXES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS)
@example(text="(a:1.3")
@example(text="BRE\\AK a\\BREAK")
def test_print_and_parse_agree(syntax, text):
    chunks = parse_weights(text, syntax)
    assert chunks
    assert all(piece.text == piece.text.strip() != "" for chunk in chunks for piece in chunk)
    assert parse_weights(weights_text(chunks, syntax), syntax) == chunks


def test_print():
    chunks = ((Piece("a (b)"), Piece("c", 1.5)), (Piece("d", 1e-7),))
    assert weights_text(chunks) == r"a \(b\) (c:1.5) BREAK (d:0.0000001)"
    assert weights_text(chunks[:1], "compel") == r"a \(b\) (c)1.5"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS, steps=st.integers(1, 12))
def test_nothing_breaks_it(text, steps):
    schedule = schedule_of(text, steps)
    begun = [first for first, _ in schedule]
    assert begun[0] == 0 and begun == sorted(set(begun)) and begun[-1] < steps
    assert all(one[1] != other[1] for one, other in pairwise(schedule))
    if "[" not in text:
        assert schedule == ((0, text),)
    assert 1 <= len(alternatives(text)) <= 1 + text.count("AND")
    try:
        rest, _ = adapters_in(text)
    except LdmError as error:
        assert "<lora:" in str(error)
    else:
        assert len(rest) <= len(text)


HOSTILE = [
    "(",
    "[",
    ")",
    "]",
    "(a",
    "[a:",
    "[a|",
    "\\",
    ":",
    ":1",
    " ",
    "a ",
    "BREAK ",
    " :1.2",
    "+",
    "-",
    "a+",
    "<lora:",
]


@pytest.mark.parametrize("sign", HOSTILE)
def test_time_is_linear(sign):
    """Of 10 000 characters; what is quadratic in them takes much longer."""
    count = 10_000 // len(sign)
    for text in (sign * count, sign * (count // 2) + {"(": ")", "[": "]"}.get(sign[0], "x") * (count // 2)):
        begun = time.process_time()
        for syntax in ("a1111", "comfy", "compel"):
            assert all(abs(p.weight) <= MAX_WEIGHT for chunk in parse_weights(text, syntax) for p in chunk)
        schedule_of(text, 2)
        alternatives(text)
        adapters_in(text)
        assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(0, "test")]),
        ("a [b:3]", [(0, "a "), (3, "a b")]),
        ("a [b: 3 ]", [(0, "a "), (3, "a b")]),
        ("a [b::3] c", [(0, "a b c"), (3, "a  c")]),
        ("a [b:c:0.5]", [(0, "a b"), (5, "a c")]),
        ("a [b:.5] c", [(0, "a  c"), (5, "a b c")]),
        ("a [b:1.0]", [(0, "a ")]),  # with a point a share: all of the steps
        ("a [b:1]", [(0, "a "), (1, "a b")]),  # without, a step
        ("a [b:0]", [(0, "a b")]),
        ("a [b:-2]", [(0, "a b")]),
        ("a [b:99]", [(0, "a ")]),
        ("a [b : c : 1] d", [(0, "a b  d"), (1, "a  c  d")]),
        ("a [[[b]]:2]", [(0, "a "), (2, "a [[b]]")]),
        ("[(a:2):3]", [(0, ""), (3, "(a:2)")]),
        ("a[b:[c:d:2]:1]e", [(0, "abe"), (1, "ace"), (2, "ade")]),
        ("a [unbalanced", [(0, "a [unbalanced")]),
        ("((a][:b:c [d:3]", [(0, "((a][:b:c "), (3, "((a][:b:c d")]),
        ("[a:b]", [(0, "[a:b]")]),
        ("[a:b:c:3]", [(0, "[a:b:c:3]")]),
        ("[a (b:c:3]", [(0, "[a (b:c:3]")]),
        (r"\[a:b:3\]", [(0, r"\[a:b:3\]")]),
        ("a | b [c:3]", [(0, "a | b "), (3, "a | b c")]),
        ("[a:" + "9" * 400 + ".0]", [(0, "")]),
    ],
)
def test_schedule(text, expected):
    assert schedule_of(text, 10) == tuple(expected)


def test_the_example_of_a1111():
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert schedule_of(text, 100) == (
        (0, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (25, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (60, "fantasy landscape with a lake and an oak in background masterful"),
        (75, "fantasy landscape with a lake and a christmas tree in background masterful"),
    )


def test_taking_turns():
    assert [text for _, text in schedule_of("[a|(b:1.1)|]!", 5)] == ["a!", "(b:1.1)!", "!", "a!", "(b:1.1)!"]
    assert schedule_of("[fe|]male", 3) == ((0, "female"), (1, "male"), (2, "female"))
    assert schedule_of("[a|a]", 9) == ((0, "a"),)
    assert schedule_of("[[a|b]:c:2]", 4) == ((0, "a"), (1, "b"), (2, "c"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :0.7 AND a dog", [("a cat", 0.7), (" a dog", 1)]),
        ("a :1AND b: -2 AND", [("a :1AND b", -2), ("", 1)]),
        ("a:2. AND (b:1.5) AND c : .5", [("a", 2), (" (b:1.5)", 1), (" c", 0.5)]),
        ("ANDY HAND and", [("ANDY HAND and", 1)]),
        ("a clock at 10:30", [("a clock at 10:30", 1)]),
        ("a:" + "9" * 400 + " AND b", [("a:" + "9" * 400, 1), (" b", 1)]),
    ],
)
def test_alternatives(text, expected):
    assert alternatives(text) == tuple(expected)


@pytest.mark.parametrize(
    ("tag", "name", "unet", "towers"),
    [
        ("<lora:style>", "style", 1, 1),
        ("<lora:style:0.8>", "style", 0.8, 0.8),
        ("<lora:my style-v1.2:0.5:0.25>", "my style-v1.2", 0.25, 0.5),  # first the text towers'
        ("<lyco:a:te=0.5:unet=2>", "a", 2, 0.5),
        ("<lora:a:-1:unet=0>", "a", 0, -1),
    ],
)
def test_adapters(tag, name, unet, towers):
    assert adapters_in(f"a {tag}cat") == ("a cat", (NamedAdapter(name, unet, towers),))


def test_other_tags_are_text():
    for text in ("<hypernet:a:1>", "a < b", "<lora>", "<lora:a"):
        assert adapters_in(text) == (text, ())
    assert [one.name for one in adapters_in("<lora:a><lora:b:2>")[1]] == ["a", "b"]


@pytest.mark.parametrize("tag", ["<lora:a:much>", "<lora:a:nan>", "<lora:a:1:inf>", "<lora: :1>", "<lora:te=1>"])
def test_adapters_that_cannot_be(tag):
    with pytest.raises(LdmError, match=r"prompt: '<lora.*found .*expected .*write <lora:name:0.8>"):
        adapters_in(tag)


def test_torch_is_not_needed():
    code = (
        "import sys, ldm.pipeline.text.prompt, ldm.pipeline.text.prompt_weights, ldm.pipeline.text.wildcards;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Token ids against open_clip's own tokenizer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from ldm.models.tokenizer import END, LENGTH, START, tokenize, word_ids

THEIRS = SimpleTokenizer()
AWKWARD = {
    "empty": "",
    "white space alone": " \t\r\n\u00a0\u3000\u2028 ",
    "white space between": "a\tred\r\napple\u00a0on  \u2003 a\x0btable\x1c\x85now",
    "capitals": "A RED Apple, ÉCOLE ΣΊΣΥΦΟΣ İstanbul STRASSE ẞ",
    "emoji": "🍎 an apple 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 1️⃣",
    "entities": "fish &amp; chips &lt;b&gt; &amp;amp;amp;amp;lt; &eacute;&EACUTE; &#x1F34E; &#0; &nbsp; &nosuch; &copy",
    "entities beside a tag": "a < b &amp;lt; c &amp;amp;lt; d &amp;amp;amp;lt;",
    "ampersands": "salt & pepper && R&D &",
    "cjk": "一个红苹果 りんご 사과 ﾊﾝｶｸ ＦＵＬＬ　ｗｉｄｔｈ",
    "accents": "crème brûlée, naïve Zürich, smörgåsbord",
    "combining": "cre\u0300me bru\u0302le\u0301e Z\u0351\u036b\u0343a\u0489lgo \u0345",
    "mojibake": "crÃ¨me brÃ»lÃ©e â€œquotedâ€\x9d",
    "contractions": "I'm sure it's what they're after; we've, he'll, she'd, DON'T 'twas rock'n'roll '\u017f ’s",
    "right to left": "תפוח אדום تفاحة حمراء \u202eelppa der\u202c",
    "digits": "3 apples, 42 pears, 1234567890, ½ ² Ⅷ ٣",
    "punctuation": "!!! ... (((red))) [apple:1.3] {a|b} <lora:x:1> a_b-c/d\\e @#$%^*~`",
    "marks": "<start_of_text> an apple <end_of_text> <END_OF_TEXT> <|endoftext|> <start_of_text",
    "marks run together": "<<start_of_text>>a<end_of_text>b<End_Of_Text>",
    "long word": "supercalifragilistic" * 15,
    "long unknown word": "qzjxkvwy" * 40,
    "repeated letters": "a" * 299 + " " + "ab" * 150,
    "long text": "a red apple on a wooden table in the morning light " * 30,
    "control characters": "a\x00b\x01c\x07 \x1b[31mred\x1b[0m\x7f\x9f",
    "invisible": "a\u200bb\u200dc\ufeffd\u00ade",
    "ligatures": "ﬁsh ﬂower oﬀer ĳs ǆ",
    "quotes": "“red” ‘apple’ «x» „y‟",
    "lone surrogate": "a \ud83c apple",
    "private and unassigned": "\ue000 \uffff \U0010ffff \U00050000",
    "Kelvin and Ångström": "300 \u212a, 5 \u212b",
}


def expected(text: str) -> list[int]:
    return THEIRS(text)[0].tolist()


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_awkward_strings_equal_open_clip(text):
    assert tokenize(text) == expected(text)
    assert word_ids(text) == THEIRS.encode(text)


PIECES = ["&amp;", "&lt", "&#39;", "&", "'s", "'LL", "<start_of_text>", "<END_OF_TEXT>", "<", " ", "\n", "é", "e\u0301"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(max_codepoint=127), max_size=60),
    st.lists(st.one_of(st.sampled_from([*PIECES, "apple", "Red", "x", "7"]), st.characters()), max_size=12).map(
        "".join
    ),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_any_string_equals_open_clip(text):
    assert word_ids(text) == THEIRS.encode(text)


def test_the_table_of_an_apple():
    assert tokenize("a red apple", length=6, padding=END) == [START, 320, 736, 3055, END, END]


@pytest.mark.parametrize("padding", [0, END])
@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 200])
def test_always_as_long_as_asked_with_an_end(words, padding):
    ids = tokenize("apple " * words, padding=padding)
    kept = min(words, LENGTH - 2)
    assert ids == [START, *[3055] * kept, END, *[padding] * (LENGTH - 2 - kept)]


def test_shorter_contexts_are_cut_before_the_end():
    assert (
        tokenize("a red apple", length=4)
        == THEIRS("a red apple", context_length=4)[0].tolist()
        == [START, 320, 736, END]
    )


def test_nothing_heavy_is_imported():
    heavy = ("torch", "open_clip", "transformers", "ftfy", "numpy")
    code = (
        "import sys; from ldm.models.tokenizer import tokenize; tokenize('a red apple');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_table_is_one_clear_error(monkeypatch):
    from ldm.errors import LdmError
    from ldm.models import tokenizer

    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LdmError, match="pip install open_clip_torch"):
        tokenizer._tables.__wrapped__()

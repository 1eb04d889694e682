"""What flags of `ldm tune` come to: the word of an embedding in captions, found as prompts find it, and the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.apps.flags.commands import Tune
from ldm.apps.flags.tune import Learning
from ldm.apps.tune import has_word, loop_of, with_word
from ldm.data.captions import CaptionRules, whole
from ldm.data.example import Example, PictureSet
from ldm.data.file_at import FileAt
from ldm.errors import LdmError
from ldm.models.presets import sd1, small, tiny
from ldm.pipeline.load import random_system
from ldm.training.textual_inversion import new_word
from ldm.training.tune.settings import Method, Tuning

PATH = Path("pictures")


def told(word: str, *captions: str, rules: CaptionRules | None = None, method: Method = "embedding") -> PictureSet:
    """Captions as they are trained on, and the notes."""
    examples = tuple(
        Example(f"{i}.png", FileAt(PATH), (text,), rules or CaptionRules()) for i, text in enumerate(captions)
    )
    return with_word(Tuning(PATH, PATH, method, word=word), PictureSet(PATH, examples))[1]


def captions(found: PictureSet) -> list[str]:
    return [whole(example.captions[0], example.rules) for example in found.examples]


@pytest.mark.parametrize("text", ["she asks", "sks2", "basks in", "masks"])
def test_a_part_of_a_word_is_not_the_word(text):
    found = told("sks", text)
    assert captions(found) == [f"sks {text}"] and found.notes == (
        "no caption holds the word 'sks': it is put before each",
    )


@pytest.mark.parametrize("text", ["a sks, red", "SKS toy", "of sks.", "sks-toy", "embedding:sks"])
def test_the_word_is_found_where_a_prompt_finds_it(text):
    assert captions(told("sks", text)) == [text] and told("sks", text).notes == ()


@pytest.mark.parametrize("text", ["she asks", "sks2", "a sks, red", "SKS toy", "sks-toy", "a robot", "robots", "no"])
@pytest.mark.parametrize("word", ["sks", "robot"])
def test_has_word_agrees_with_what_towers_are_told(text, word):
    """Another embedding of the word changes what the model is told of exactly these texts."""
    model = random_system(tiny(sd1()))
    one, two = (new_word(model, word, 1, start) for start in ("red", "blue"))
    said = [model.with_embeddings([each.live()]).encode_prompt(text).cross for each in (one, two)]
    assert said[0] is not None and said[1] is not None
    assert has_word(text, word) == (not torch.equal(said[0], said[1]))


def test_prefixes_count_and_other_methods_are_left_alone():
    assert captions(told("sks", "red", rules=CaptionRules(prefix="a sks"))) == ["a sks red"]
    assert captions(told("sks", "red", method="lora")) == ["red"] and told("robot", "red", method="lora").notes == ()


def test_pictures_of_the_class_are_not_what_the_word_is_for():
    examples = [Example(f"{i}.png", FileAt(PATH), ("red",), CaptionRules(), regular=i == 1) for i in range(2)]
    found = with_word(Tuning(PATH, PATH, "embedding"), PictureSet(PATH, tuple(examples)))[1]
    assert captions(found) == ["sks red", "red"] and len(found.notes) == 1


def test_pictures_without_the_word_are_counted():
    found = told("sks", "a sks", "red", "blue")
    assert captions(found) == ["a sks", "red", "blue"]
    assert found.notes == ("2 of 3 pictures have no caption with the word 'sks', as 1.png: they teach it nothing",)


@pytest.mark.parametrize(("asked", "expected"), [(None, 10), (7, 7)])
def test_saves_may_come_at_other_steps_than_looks(asked, expected):
    command = Tune(PATH, learning=Learning(steps=100, looks=10, save_every=asked))
    loop = loop_of(command, Tuning(PATH, PATH), small(), 10, "no")
    assert (loop.save_every, loop.evaluate_every) == (expected, 10)


def test_a_word_that_the_model_knows_is_noted():
    (note,) = told("Robot", "a robot").notes
    assert note.startswith("the model knows a word 'Robot': captions and prompts that say it mean the new one instead")
    assert told("my-robot", "a my-robot").notes == ()


@pytest.mark.parametrize("word", ["", ".sks", "a/b", "a\\b", "a\nb", "a\0b", "x" * 201, "\u00e9" * 101])
def test_a_word_that_can_name_no_file_is_refused_at_once(word):
    with pytest.raises(LdmError, match=r"word: found .*, expected one that can be the name of a file") as refused:
        Tuning(Path(), Path(), method="embedding", word=word)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    Tuning(Path(), Path(), method="embedding", word="\u00e9" * 100)

"""Weighted prompts of any length: chunks by hand-worked rules, weights against numpy and compel, bits that stay."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compel.embeddings_provider import DownweightMode, EmbeddingsProvider, ReturnedEmbeddingsType
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2, sdxl, tiny
from ldm.models.text_encoder import TextStates
from ldm.models.tokenizer import COMMA, END, START, text_of, tokenize, word_ids
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.text.emphasis import BACKTRACK, MAX_CHUNKS, token_chunks
from ldm.pipeline.text.prompt import Emphasis
from ldm.weights.embeddings import Embedding

CONFIGS = {"sd1": sd1(), "sd2": sd2(), "sdxl": sdxl()}
EMPHASES: tuple[Emphasis, ...] = ("a1111", "no-norm", "comfy", "compel", "ignore", "literal")
(CAT,), (DOG,) = word_ids("cat"), word_ids("dog")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return random_system(tiny(CONFIGS[request.param]))


@pytest.fixture(scope="module")
def sd1_model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


def cross(model: LatentDiffusion, prompt: str, emphasis: Emphasis = "a1111") -> torch.Tensor:
    states = model.encode_prompt(prompt, emphasis=emphasis).cross
    assert states is not None
    return states


def ids_of(prompt: str, emphasis: Emphasis = "a1111", room: int = 75, words: dict[str, range] | None = None):
    return [[token.id for token in chunk] for chunk in token_chunks(prompt, room, words or {}, emphasis)]


def numpy_states(model: LatentDiffusion, words: Sequence[str], weights: Sequence[float]) -> list[np.ndarray]:
    """Each tower's plain states (77, D) of words, and of no words; and the weight of each place (77, 1)."""
    places = [1.0] + [weight for word, weight in zip(words, weights, strict=True) for _ in word_ids(word)]
    column = np.array(places + [1.0] * (77 - len(places)))[:, None]
    plain, empty = (cross(model, text, "literal")[0].double().numpy() for text in (" ".join(words), ""))
    towers = len(model.text)
    return [*np.split(plain, towers, axis=1), *np.split(empty, towers, axis=1), column]


def tower_runs(model: LatentDiffusion, ids: Sequence[int], index: int = 0) -> TextStates:
    use = model.config.text[index]
    with torch.inference_mode():
        return model.text[index](torch.tensor([ids]), use.skip, use.final_norm, use.pooled)


@pytest.mark.parametrize("emphasis", EMPHASES)
def test_a_plain_prompt_is_what_the_tower_says(model, emphasis):
    """Bit for bit: one run of each tower over the 77 ids that its family pads in its own way."""
    prompt = "a red apple, on a table"
    runs = [tower_runs(model, tokenize(prompt, 77, use.padding), index) for index, use in enumerate(model.config.text)]
    cond = model.encode_prompt(prompt, emphasis=emphasis)
    assert torch.equal(cond.cross, torch.cat([run.states for run in runs], dim=-1))
    if runs[-1].pooled is not None:
        assert torch.equal(cond.vector[:, : runs[-1].pooled.shape[1]], runs[-1].pooled)


def test_padding_is_each_family_s_own(model):
    for index, use in enumerate(model.config.text):
        ids = tokenize("cat", 77, use.padding)
        assert ids[:3] == [START, CAT, END] and set(ids[3:]) == ({END} if use.padding else {0})
        width = use.tower.width
        shown = cross(model, "cat")[..., index * width : (index + 1) * width]
        assert torch.equal(shown, tower_runs(model, ids, index).states)


def test_a_long_prompt_begins_as_a_short_one(model):
    words = [f"{word} {digit}" for digit in range(10) for word in ("cat", "dog", "red", "sky")]
    short, long = " ".join(words[:37]) + " cat", " ".join([*words[:37], "cat", *words])
    assert [len(chunk) for chunk in ids_of(long)] == [75, 75, 5]
    assert torch.equal(cross(model, long)[:, :77], cross(model, short))
    assert cross(model, long).shape[1] == 3 * 77


@pytest.mark.parametrize("emphasis", ["a1111", "no-norm", "ignore"])
def test_break_is_two_prompts_in_a_row(model, emphasis):
    both = model.encode_prompt("a (cat:1.4) BREAK [dog]", emphasis=emphasis)
    first, second = (model.encode_prompt(text, emphasis=emphasis) for text in ("a (cat:1.4)", "[dog]"))
    assert torch.equal(both.cross, torch.cat([first.cross, second.cross], dim=1))
    if both.vector is not None:
        assert torch.equal(both.vector, model.encode_prompt("a cat").vector)  # the first chunk's, without weights


def test_commas_are_gone_back_to():
    """60 words and a comma, then 30: behind the 75th token the chunk goes back to the comma, 14 places."""
    text = "cat " * 60 + ", " + "dog " * 30
    assert ids_of(text) == [[CAT] * 60 + [COMMA], [DOG] * 30]
    text = "cat " * (74 - BACKTRACK) + ", " + "dog " * 30  # one place too far back
    assert ids_of(text) == [[CAT] * 54 + [COMMA] + [DOG] * 20, [DOG] * 10]
    text = "cat " * (75 - BACKTRACK) + ", " + "dog " * 30  # just near enough
    assert ids_of(text) == [[CAT] * 55 + [COMMA], [DOG] * 30]
    text = "cat " * 74 + ", " + "dog " * 2  # the last place
    assert ids_of(text) == [[CAT] * 74 + [COMMA], [DOG] * 2]
    text = "cat " * 75 + ", dog"  # a comma itself is not moved
    assert ids_of(text) == [[CAT] * 75, [COMMA, DOG]]
    assert ids_of("cat " * 60 + ", " + "dog " * 14) == [[CAT] * 60 + [COMMA] + [DOG] * 14]  # it fits


def test_weights_move_with_their_words():
    chunks = token_chunks("cat " * 60 + ", (" + "dog " * 30 + ":1.5)", 75)
    assert [{token.weight for token in chunk} for chunk in chunks] == [{1.0}, {1.5}]


def test_break_ends_a_chunk():
    assert ids_of("cat BREAK dog") == [[CAT], [DOG]]
    assert ids_of("cat " * 75 + "BREAK dog") == [[CAT] * 75, [DOG]]
    assert ids_of("BREAK BREAK dog BREAK") == [[], [], [DOG]]
    assert ids_of("") == [[]]


def test_comfy_keeps_words_together():
    word = "catdogcatdog"
    ids = word_ids(word)
    assert 1 < len(ids) < 8
    assert ids_of("cat " * 74 + word, "comfy") == [[CAT] * 74, ids]
    assert ids_of("cat " * 60 + ", " + "dog " * 30, "comfy") == [[CAT] * 60 + [COMMA] + [DOG] * 14, [DOG] * 16]
    long = "!1" * 4  # eight tokens: a large word, which is cut where the chunk ends
    assert len(word_ids(long)) == 8
    assert ids_of("cat " * 74 + long, "comfy") == [[CAT] * 74 + word_ids(long)[:1], word_ids(long)[1:]]


@pytest.mark.parametrize("emphasis", ["a1111", "compel"])
def test_an_embedding_stays_together(emphasis):
    words = {"sks": range(60_000, 60_003)}
    assert ids_of("cat " * 72 + "sks", emphasis, words=words) == [[CAT] * 72 + [60_000, 60_001, 60_002]]
    for before in (73, 74, 75):
        assert ids_of("cat " * before + "sks dog", emphasis, words=words) == [
            [CAT] * before,
            [60_000, 60_001, 60_002, DOG],
        ]
    assert ids_of("sks", emphasis, room=2, words=words) == [[60_000, 60_001], [60_002]]


def test_an_embedding_at_the_edge_is_encoded_whole(model):
    vectors = tuple(torch.randn(3, use.tower.width) for use in model.config.text)
    with_sks = model.with_embeddings([Embedding("sks", vectors, "ab" * 32)])
    states = cross(with_sks, "cat " * 74 + "(sks:1.3)")
    assert torch.equal(states[:, 77:], cross(with_sks, "(sks:1.3)"))
    assert torch.equal(states[:, :77], cross(model, "cat " * 74))


def test_other_towers_have_other_rooms():
    config = tiny(sd1())
    small = replace(config, text=tuple(replace(use, tower=replace(use.tower, tokens=12)) for use in config.text))
    model = random_system(small)
    assert cross(model, "cat " * 25).shape[1] == 36
    assert torch.equal(cross(model, "cat " * 25)[:, :12], cross(model, "cat " * 10))


WORDS, WEIGHTS = ["a", "photographing", "cat", "in", "the rain"], [1.0, 1.5, 1.21, 1.0, 0.6]
BRACKETS = "a (photographing:1.5) ((cat)) in (the rain:0.6)"


@pytest.mark.parametrize("restored", [True, False])
def test_a1111_multiplies(model, restored):
    """z w, and then by mean(z) / mean(z w), over a tower's chunk."""
    states = numpy_states(model, WORDS, WEIGHTS)
    plain, column = states[: len(model.text)], states[-1]
    expected = [z * column * (z.mean() / (z * column).mean() if restored else 1) for z in plain]
    found = cross(model, BRACKETS, "a1111" if restored else "no-norm")[0].double().numpy()
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=2e-5, rtol=2e-4)


def test_comfy_goes_from_the_empty_prompt(model):
    states = numpy_states(model, WORDS, WEIGHTS)
    count, column = len(model.text), states[-1]
    expected = [(z - empty) * column + empty for z, empty in zip(states[:count], states[count:-1], strict=True)]
    found = cross(model, BRACKETS, "comfy")[0]
    np.testing.assert_allclose(found.double().numpy(), np.concatenate(expected, axis=1), atol=1e-5, rtol=1e-5)
    untouched = torch.from_numpy(column[:, 0] == 1)
    assert torch.equal(found[untouched], cross(model, " ".join(WORDS))[0][untouched])


def test_ignored_weights_are_1(model):
    assert torch.equal(cross(model, BRACKETS, "ignore"), cross(model, " ".join(WORDS)))


def test_literal_brackets_are_tokens(model):
    assert ids_of("(cat:1.5)", "literal") == [word_ids("(cat:1.5)")]
    assert torch.equal(cross(model, "(cat:1.5)", "literal"), cross(model, r"\(cat:1.5\)"))


@pytest.fixture(scope="module")
def compel(sd1_model, tmp_path_factory) -> EmbeddingsProvider:
    """compel on transformers' tower with our weights."""
    tower = sd1_model.config.text[0].tower
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=tower.width, intermediate_size=4 * tower.width, num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads, hidden_act="quick_gelu", vocab_size=tower.vocabulary,
        )
    )  # fmt: skip
    ours = sd1_model.text[0].state_dict()
    bare = not any(name.startswith("text_model.") for name in text.state_dict())
    state = {name.removeprefix("text_model.") if bare else name: tensor for name, tensor in ours.items()}
    missing, unexpected = text.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    folder: Path = tmp_path_factory.mktemp("clip")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    encoder = {names.get(word, word): index for word, index in SimpleTokenizer().encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(encoder))
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, pad_token="<|endoftext|>", model_max_length=77, local_files_only=True
    )
    return EmbeddingsProvider(
        tokenizer, text.eval(), downweight_mode=DownweightMode.REMOVE,
        returned_embeddings_type=ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat++ in the rain", [("a", 1), ("cat", 1.21), ("in the rain", 1)]),
        ("a cat-- in the rain", [("a", 1), ("cat", 0.81), ("in the rain", 1)]),
        ("a (red)0.3 cat+ (the rain)0 dog", [("a", 1), ("red", 0.3), ("cat", 1.1), ("the rain", 0), ("dog", 1)]),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_compel_is_compel(sd1_model, compel, prompt, pieces):
    texts, weights = zip(*pieces, strict=True)
    theirs = compel.get_embeddings_for_weighted_prompt_fragments([list(texts)], [list(weights)])
    torch.testing.assert_close(cross(sd1_model, prompt, "compel"), theirs, atol=2e-5, rtol=1e-4)


def test_what_is_cut_is_named(sd1_model):
    long = "cat " * 75 * MAX_CHUNKS
    assert sd1_model.words_cut(long) == "" == sd1_model.words_cut("")
    assert sd1_model.words_cut(long + "a (small) dog, Café & 3") == "a small dog , café & 3"
    assert sd1_model.words_cut("BREAK " * 20 + "dog") == "dog"
    assert cross(sd1_model, long + "dog").shape[1] == 77 * MAX_CHUNKS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(alphabet="abc ,()[]:+-1.é猫", max_size=300))
def test_no_token_is_lost(text):
    for emphasis in ("a1111", "comfy", "compel", "literal"):
        whole, parts = token_chunks(text, 4000, {}, emphasis), token_chunks(text, 10, {}, emphasis)
        assert [token for chunk in parts for token in chunk] == [token for chunk in whole for token in chunk]
        assert all(len(chunk) <= 10 for chunk in parts)
        assert all(len(chunk) > 0 for chunk in parts) or parts == [[]]


def test_ids_are_read_back():
    assert text_of(word_ids("A photo of 2 猫, naïve!")) == "a photo of 2 猫 , naïve !"
    words = {"My-Name": range(60_000, 60_003)}
    assert text_of(word_ids("a my-name b", words), words) == "a My-Name b"


def test_weights_that_are_too_large(sd1_model):
    half = random_system(tiny(sd1()), dtype=torch.float16)
    half.text[0].text_model.final_layer_norm.bias += 100
    with pytest.raises(LdmError, match="a weight in the prompt is too large"):
        half.encode_prompt("(cat:10000)", emphasis="no-norm")
    assert torch.isfinite(cross(sd1_model, "(cat:99999)")).all()

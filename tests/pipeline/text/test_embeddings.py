"""Prompts with embeddings: text states equal diffusers' after `load_textual_inversion`, and how names are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from their_text import their_loader, their_tokenizer, their_tower, tokenizer_files

from ldm.apps.cli import main
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.models.text_encoder import CLIPText, OpenCLIPText
from ldm.models.tokenizer import END, START, split_at_names, tokenize, word_ids
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import random_system
from ldm.pipeline.metadata.read import read_metadata
from ldm.pipeline.text.emphasis import MAX_CHUNKS
from ldm.weights.embeddings import Embedding, read_embedding, write_embedding

WIDTH = 32


def embedding(name: str, places: int, towers: int = 1, seed: int = 0) -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    return Embedding(name, tuple(torch.randn(places, WIDTH, generator=generator) for _ in range(towers)), "ab" * 32)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return random_system(tiny(sd1()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


PROMPTS = {
    "one vector": "a photo of <cat-toy> on a table",
    "three vectors": "a photo of <style>, an apple",
    "both, twice": "<style> and <cat-toy>, <cat-toy> and a <style>",
    "alone": "<style>",
    "cut": "a red apple on a table " * 12 + "<style> and an apple " * 4,
    "none": "a red apple",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
@torch.inference_mode()
def test_text_states_equal_diffusers(layout, prompt, folder, tmp_path):
    """Both read the files that we write."""
    config = tiny({"sd1": sd1, "sd2": sd2, "sdxl": sdxl}[layout]())
    towers = len(config.text)
    model = random_system(config)
    files = {"<cat-toy>": tmp_path / "a.safetensors", "<style>": tmp_path / "b.safetensors"}
    for seed, (name, path) in enumerate(files.items()):
        write_embedding(path, embedding(name, 1 + 2 * seed, towers, seed))
    ours = model.with_embeddings([replace(read_embedding(path), name=name) for name, path in files.items()])
    states, pooled = [], []
    for index, (tower, use) in enumerate(zip(model.text, config.text, strict=True)):
        assert isinstance(tower, CLIPText | OpenCLIPText)
        tokenizer, text = their_tokenizer(folder, use), their_tower(tower, use)
        loader = their_loader(tokenizer, text)
        for name, path in files.items():
            held = load_file(path)
            given = held["emb_params"] if towers == 1 else held[("clip_l", "clip_g")[index]]
            # In one form the file itself, in the other the tensor: as their documentation says for SDXL.
            loader.load_textual_inversion(str(path) if towers == 1 else given, token=name)
        ids = tokenizer(
            loader.maybe_convert_prompt(prompt, tokenizer), padding="max_length", truncation=True, max_length=77,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        encoded = text(ids, output_hidden_states=True)
        state = encoded.hidden_states[-1 - use.skip]
        norm = text.text_model.final_layer_norm if hasattr(text, "text_model") else text.final_layer_norm
        states.append(norm(state) if use.final_norm else state)
        if use.pooled:
            pooled.append(encoded.text_embeds)
    cond = ours.encode_prompt(prompt)
    assert cond.cross is not None
    first = cond.cross[:, :77]  # they cut what is longer
    torch.testing.assert_close(first, torch.cat(states, dim=-1), atol=1e-4, rtol=1e-4)
    if pooled:
        assert cond.vector is not None
        torch.testing.assert_close(cond.vector[:, :WIDTH], pooled[0], atol=1e-4, rtol=1e-4)


def test_the_old_model_is_as_it_was(model):
    before = model.encode_prompt("a sks")
    other = model.with_embeddings([embedding("sks", 2)])
    assert not torch.equal(other.encode_prompt("a sks").cross, before.cross)
    assert torch.equal(model.encode_prompt("a sks").cross, before.cross)
    assert torch.equal(other.encode_prompt("a dog").cross, model.encode_prompt("a dog").cross)
    assert all(getattr(other, part) is getattr(model, part) for part in ("unet", "autoencoder", "text"))
    assert torch.equal(other.with_embeddings([]).encode_prompt("a sks").cross, before.cross)


def test_places_are_counted(model):
    other = model.with_embeddings([embedding("sks", 30)])
    two_a_chunk = 2 * MAX_CHUNKS
    assert other.words_cut("sks " * two_a_chunk) == ""
    assert other.words_cut("sks " * (two_a_chunk + 1) + "dog") == "sks dog"
    assert model.words_cut("sks " * (two_a_chunk + 1)) == ""


WORDS = {"cat": range(60_000, 60_002), "Cat-Toy": range(60_002, 60_003), "<x>": range(60_003, 60_004)}
A, COMMA, SMALL = word_ids("a"), word_ids(","), word_ids("-")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a cat", [*A, 60_000, 60_001]),
        ("A CAT, a cAt", [*A, 60_000, 60_001, *COMMA, *A, 60_000, 60_001]),
        ("a cat-toy", [*A, 60_002]),
        ("cat-toys", [60_000, 60_001, *SMALL, *word_ids("toys")]),
        ("a concatenated cat2 wildcat", word_ids("a concatenated cat2 wildcat")),
        ("a<x>a", [*A, 60_003, *A]),
        ("embedding:cat, embedding:<x>", [60_000, 60_001, *COMMA, 60_003]),
        ("embedding: cat", [*word_ids("embedding:"), 60_000, 60_001]),
        ("cat's", [60_000, 60_001, *word_ids("'s")]),
        ("", []),
    ],
)
def test_names_are_found(text, ids):
    assert word_ids(text, WORDS) == ids
    assert tokenize(text, 16, 0, WORDS) == ([START, *ids[:14], END] + [0] * 16)[:16]


def test_names_are_given_back_as_they_are_written():
    assert split_at_names("a CAT-TOY here", ["cat", "Cat-Toy"]) == [("a ", "Cat-Toy"), (" here", "")]


def test_signs_in_names_mean_nothing():
    assert split_at_names("a.b a+b", ["a.b"]) == [("", "a.b"), (" a+b", "")]


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (sd1(), embedding("x", 1), "embedding x: is for a model (text 32 wide), this model is SD 1.x (text 768 wide)"),
        (sd2(), Embedding("x", (torch.zeros(1, 768),), ""), "is for SD 1.x (text 768 wide), this model is SD 2.x"),
        (sdxl(), Embedding("x", (torch.zeros(1, 768),), ""), "this model is SDXL (text 768 and 1280 wide)"),
        (sd1(), Embedding("x", (torch.zeros(1, 768), torch.zeros(1, 1280)), ""), "is for SDXL (text 768 and 1280"),
    ],
)  # fmt: skip
def test_another_family_is_refused(config: SystemConfig, given: Embedding, said: str, model):
    other = replace(model, config=config)
    with pytest.raises(LdmError) as caught:
        other.with_embeddings([given])
    assert said in str(caught.value)


def test_the_refiner_takes_the_second_tower_of_sdxl():
    model = random_system(tiny(sdxl_refiner()))
    given = embedding("x", 2, towers=2)
    other = model.with_embeddings([given])
    assert other.embeddings[0].vectors[0] is given.vectors[1]
    assert not torch.equal(other.encode_prompt("x").vector, model.encode_prompt("x").vector)


@pytest.mark.parametrize(("names", "said"), [(("X", "x"), "another of this name"), ((" ",), "its name is empty")])
def test_names_that_cannot_be(names, said, model):
    with pytest.raises(LdmError, match=said):
        model.with_embeddings([embedding(name, 1) for name in names])


def test_pictures_say_what_was_used(model, tmp_path):
    other = model.with_embeddings([embedding("sks", 1), embedding("Bad Hands", 2), embedding("idle", 1)])
    (picture,) = other.generate("a sks", negative="bad hands", steps=1, seed=0)
    assert picture.embeddings == (("sks", "ab" * 32), ("Bad Hands", "ab" * 32))
    metadata = read_metadata(picture.save(tmp_path / "x.png"))
    assert metadata.parameters is not None and metadata.record is not None
    assert 'TI hashes: "sks: abababababab, Bad Hands: abababababab"' in metadata.parameters
    assert metadata.record["embeddings"] == [
        {"name": "sks", "hash": "ab" * 32},
        {"name": "Bad Hands", "hash": "ab" * 32},
    ]


def test_the_command_line(tmp_path, tiny_file, capsys):
    write_embedding(tmp_path / "sks.safetensors", embedding("sks", 3))
    torch.save({"<cat>": torch.zeros(WIDTH)}, tmp_path / "learned_embeds.bin")
    files = ["--embedding", str(tmp_path / "sks.safetensors"), "--embedding", str(tmp_path / "learned_embeds.bin")]
    common = ["generate", "a SKS, no <cat>", "--model", str(tiny_file(tiny(sd1()))), "--steps", "1", "--device", "cpu"]
    output = ["-o", str(tmp_path / "x.png"), *files]
    assert main([*common, *output]) == 2
    assert "learned_embeds.bin: is a zip archive" in capsys.readouterr().err
    assert main([*common, *output, "--allow-pickle"]) == 0
    said = capsys.readouterr().err
    assert "embedding: sks, 3 tokens" in said
    assert "embedding: <cat>, 1 tokens" in said
    record = read_metadata(tmp_path / "x.png").record
    assert record is not None
    assert [used["name"] for used in record["embeddings"]] == ["sks", "<cat>"]

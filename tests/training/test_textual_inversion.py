"""New words: their gradients are those of transformers, they alone are trained, their files mean the same elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from their_text import their_loader, their_tokenizer, their_tower, tokenizer_files
from torch import nn

from ldm.errors import LdmError
from ldm.models.presets import sd1, sd2, sdxl, small, tiny
from ldm.models.tokenizer import word_ids
from ldm.pipeline.load import random_system
from ldm.training.text_states import caption_ids, text_states
from ldm.training.textual_inversion import NewWord, new_word
from ldm.weights.embeddings import read_embedding, write_embedding

LAYOUTS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}
CAPTIONS = ("a photo of <robot>", "<robot> and <robot> on a table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_transformers(layout):
    """Their towers with the same weights, the vectors as new rows of their embedding."""
    model = random_system(tiny(LAYOUTS[layout]()))
    word = new_word(model, "<robot>", 3, "small robot")
    model = model.with_embeddings([word.live()])
    ids = caption_ids(model, CAPTIONS)
    said = text_states(model, ids)
    targets = torch.randn(said.states.shape), None if said.pooled is None else torch.randn(said.pooled.shape)
    loss = (said.states * targets[0]).sum()
    if said.pooled is not None and targets[1] is not None:
        loss = loss + (said.pooled * targets[1]).sum()
    loss.backward()
    start = 0
    for index, (tower, use) in enumerate(zip(model.text, model.config.text, strict=True)):
        text: Any = their_tower(tower, use)  # type: ignore[arg-type]
        vectors = word.vectors[index].detach().clone().requires_grad_()
        holder = text.text_model if hasattr(text, "text_model") else text
        table = holder.embeddings.token_embedding.weight.detach()
        assert int(ids.max()) == len(table) + 2
        holder.embeddings.token_embedding = _Rows(torch.cat([table, vectors]))
        encoded = text(ids[:, index, 0], output_hidden_states=True)
        state = encoded.hidden_states[-1 - use.skip]
        state = holder.final_layer_norm(state) if use.final_norm else state
        width = state.shape[-1]
        their_loss = (state * targets[0][..., start : start + width]).sum()
        if use.pooled and targets[1] is not None:
            their_loss = their_loss + (encoded.text_embeds * targets[1]).sum()
        their_loss.backward()
        start += width
        ours = word.vectors[index].grad
        assert ours is not None and vectors.grad is not None and bool(ours.abs().sum(dim=1).all())
        torch.testing.assert_close(ours, vectors.grad, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


class _Rows(nn.Module):
    """An embedding whose table may be made of other tensors."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.weight = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


def test_the_word_alone_learns():
    model = random_system(tiny(small()))
    before = {name: tensor.clone() for name, tensor in model.text[0].state_dict().items()}  # type: ignore[attr-defined]
    word = new_word(model, "<robot>", 2, "robot")
    assert sum(p.numel() for p in word.parameters()) == 2 * 32
    learning = model.with_embeddings([word.live()])
    wanted = text_states(model, caption_ids(model, ["a green apple"])).states
    optimizer = torch.optim.Adam(word.parameters(), lr=0.05)
    ids = caption_ids(learning, ["a <robot>"])
    losses = []
    for _ in range(30):
        loss = (text_states(learning, ids).states - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    after = model.text[0].state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in before)
    seen, kept = (one.encode_prompt("a <robot>").cross for one in (learning, model.with_embeddings([word.embedding()])))
    assert seen is not None and kept is not None and torch.equal(seen, kept)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_begins_as_the_words_given(count):
    model = random_system(tiny(sdxl()))
    words = "small robot toy"
    ids = word_ids(words)
    assert len(ids) == 3
    word = new_word(model, "<robot>", count, words)
    spread = {1: [0], 2: [0, 1], 5: [0, 0, 1, 1, 2]}[count]
    tables = [
        model.text[0].text_model.embeddings.token_embedding.weight,  # type: ignore[attr-defined]
        model.text[1].token_embedding.weight,  # type: ignore[attr-defined]
    ]
    for vectors, table in zip(word.vectors, tables, strict=True):
        assert torch.equal(vectors, table[[ids[i] for i in spread]])
    if count == 5:
        return
    said = model.with_embeddings([word.live()]).encode_prompt("a <robot>").cross
    plain = model.encode_prompt("a small robot").cross
    if count == 2:
        assert said is not None and plain is not None
        torch.testing.assert_close(said, plain)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_its_file_means_the_same_everywhere(family, layout, tmp_path, folder):
    model = random_system(tiny(LAYOUTS[family]()))
    word = new_word(model, "<robot>", 3, "small robot")
    with torch.no_grad():
        for vectors in word.vectors:
            vectors.add_(0.3 * torch.randn_like(vectors))
    path = tmp_path / "<robot>.safetensors"
    write_embedding(path, word.embedding(steps=20, base="tiny"), layout=layout)
    read = read_embedding(path)
    assert (read.name, read.steps, read.base) == ("<robot>", 20, "tiny")
    learning = model.with_embeddings([word.live()])
    ours = text_states(learning, caption_ids(learning, CAPTIONS[:1]))
    again = model.with_embeddings([read]).encode_prompt(CAPTIONS[0]).cross
    assert again is not None
    torch.testing.assert_close(ours.states.detach(), again, rtol=1e-4, atol=1e-5)
    if family == "sdxl":  # whose towers diffusers loads one by one, from tensors: see the tests of embeddings
        return
    tower, use = model.text[0], model.config.text[0]
    text: Any = their_tower(tower, use)  # type: ignore[arg-type]
    tokenizer = their_tokenizer(folder, use)
    loader = their_loader(tokenizer, text)
    loader.load_textual_inversion(str(path), token=None if layout == "diffusers" else "<robot>")
    prompt = loader.maybe_convert_prompt(CAPTIONS[0], tokenizer)
    tokens = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        state = text(tokens, output_hidden_states=True).hidden_states[-1 - use.skip]
        norm = text.text_model.final_layer_norm if hasattr(text, "text_model") else text.final_layer_norm
        torch.testing.assert_close(ours.states.detach(), norm(state), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count", "start", "said"),
    [
        ("<robot>", 0, "robot", "has 0 vectors, expected 1 to 75"),
        ("<robot>", 76, "robot", "has 76 vectors, expected 1 to 75"),
        ("<robot>", 1, "  ", "expected a word"),
        (" ", 1, "robot", "its name is empty"),
    ],
)
def test_what_cannot_be_is_refused(name, count, start, said):
    with pytest.raises(LdmError, match=said):
        new_word(random_system(tiny(small())), name, count, start)


def test_a_word_that_is_like_none_begins_in_their_middle():
    model = random_system(tiny(sd1()))
    (vectors,) = new_word(model, "<robot>", 3, "").vectors
    table = model.text[0].text_model.embeddings.token_embedding.weight  # type: ignore[attr-defined]
    torch.testing.assert_close(vectors.detach(), table.double().mean(0).float().expand(3, -1))
    assert vectors.is_contiguous() and vectors.requires_grad


def test_its_state_is_its_vectors():
    """What a run keeps to resume."""
    model = random_system(tiny(sdxl()))
    word = new_word(model, "<robot>", 2, "robot")
    other = NewWord("<robot>", tuple(torch.zeros(2, 32) for _ in model.text))
    other.load_state_dict(word.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(word.vectors, other.vectors, strict=True))

"""Merged tokens against the published algorithm, written out in loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from ldm.layers.token_merging import MOST, Matching, Merging, match
from ldm.layers.transformer import SpatialTransformer, TransformerBlock
from ldm.models.presets import sd1, sd2, small, small_upsampler, tiny
from ldm.models.unet import finest_transformers, merging_tokens
from ldm.pipeline.load import random_system
from ldm.types import Conditioning


def groups(tokens: np.ndarray, height: int, width: int, share: float) -> list[list[int]]:
    """Bolya et al. 2023, section 3, for one picture's (h * w, C) tokens: which of them become one."""
    places = list(product(range(height), range(width)))
    corners = [(i, j) for i in range(0, height - 1, 2) for j in range(0, width - 1, 2)]
    number = {place: at for at, place in enumerate(places)}
    found = []
    for place in places:
        if place not in corners:
            a = tokens[number[place]]
            likeness = [
                float(a @ tokens[number[corner]] / np.linalg.norm(a) / np.linalg.norm(tokens[number[corner]]))
                for corner in corners
            ]
            found.append((max(likeness), number[place], number[corners[int(np.argmax(likeness))]]))
    found.sort(reverse=True)
    merged = found[: int(share * len(places))]
    together = {number[corner]: [number[corner]] for corner in corners}
    for _, source, destination in merged:
        together[destination].append(source)
    return [*together.values(), *([source] for _, source, _ in found[len(merged) :])]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 4), (5, 7)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, MOST])
def test_tokens_become_the_means_of_their_groups(height, width, share):
    x = torch.randn(3, height * width, 8, generator=torch.Generator().manual_seed(height))
    values = torch.randn(3, height * width, 5, generator=torch.Generator().manual_seed(1))
    matching = match(x, Merging(height, width, share))
    merged = matching.merge(values)
    whole = matching.part(merged).numpy()
    for row in range(3):
        expected = groups(x[row].double().numpy(), height, width, share)
        assert merged.shape[1] == len(expected)
        for group in expected:
            mean = values[row, group].double().numpy().mean(axis=0)
            np.testing.assert_allclose(whole[row, group], np.broadcast_to(mean, (len(group), 5)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_picture_merges_its_tokens_whatever_else_is_in_the_batch():
    x, merging = torch.randn(5, 24 * 24, 8, generator=torch.Generator().manual_seed(0)), Merging(24, 24, 0.5)
    together, alone = match(x, merging), [match(row, merging) for row in x.split(1)]
    assert torch.equal(together.kept, torch.cat([one.kept for one in alone]))
    assert torch.equal(together.into, torch.cat([one.into for one in alone]))


def test_self_attention_alone_sees_fewer_tokens(randomize_block):
    block = randomize_block(TransformerBlock(32, 16, 2))
    x, context = torch.randn(2, 16, 32), torch.randn(2, 5, 16)
    seen = []
    for part in (block.attn1, block.attn2, block.ff):
        part.register_forward_hook(lambda _m, given, _out: seen.append(given[0].shape[1]))
    ours = block(x, context, None, Merging(4, 4, 0.5))
    assert seen == [8, 16, 16]
    normed = block.norm1(x)
    expected = x.clone()
    for row in range(2):
        together = groups(x[row].double().numpy(), 4, 4, 0.5)
        means = torch.stack([normed[row, group].mean(dim=0) for group in together])
        for group, answer in zip(together, block.attn1(means[None])[0], strict=True):
            expected[row, group] += answer
    expected = expected + block.attn2(block.norm2(expected), context)
    torch.testing.assert_close(ours, expected + block.ff(block.norm3(expected)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_share_changes_nothing_but_the_order_of_sums(randomize_block):
    block = randomize_block(TransformerBlock(32, 16, 2))
    x, context = torch.randn(2, 12, 32), torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x, context, None, Merging(4, 3, 0.0)), block(x, context), rtol=1e-5, atol=1e-5)


@pytest.fixture
def randomize_block():
    def fill(block: TransformerBlock) -> TransformerBlock:
        generator = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        return block.eval()

    return fill


@pytest.mark.parametrize("config", [sd1(), sd2(), small()])
def test_the_finest_level_alone_merges_and_the_model_stays_as_it_is(config):
    unet = random_system(tiny(config)).unet
    merging = merging_tokens(unet, 0.5)
    level = next(level for level, depth in enumerate(unet.config.attention) if depth)
    finest = finest_transformers(merging)
    assert len(finest) == 2 * unet.config.res_blocks + 1
    sides: list[int] = []
    for module in (one for one in merging.modules() if isinstance(one, SpatialTransformer)):
        assert module.merged == (0.5 if module in finest else 0.0)
        if module in finest:
            module.register_forward_hook(lambda _m, given, _out: sides.append(given[0].shape[-1]))
    assert all(one.merged == 0 for one in unet.modules() if isinstance(one, SpatialTransformer))
    assert all(a is b for a, b in zip(unet.parameters(), merging.parameters(), strict=True))
    vector = None if unet.config.vector_width is None else torch.zeros(1, unet.config.vector_width)
    cond = Conditioning(cross=torch.zeros(1, 2, unet.config.context_width or 0), vector=vector)
    with torch.no_grad():
        merging(torch.randn(1, 4, 16, 16), torch.ones(1), cond)
    assert sides == [16 >> level] * len(finest)


def test_a_picture_is_made_with_merged_tokens_and_says_so(monkeypatch):
    model, shares = random_system(tiny(sd1())), []

    def counted(x: torch.Tensor, merging: Merging) -> Matching:
        shares.append(merging.share)
        return match(x, merging)

    monkeypatch.setattr("ldm.layers.transformer.match", counted)
    fields = {"width": 64, "height": 64, "steps": 2, "seed": 3}
    (plain,), (none,) = model.generate("x", **fields), model.generate("x", **fields, merge_tokens=0)
    assert plain.image.tobytes() == none.image.tobytes() and not shares
    (merged,) = model.generate("x", **fields, merge_tokens=0.5)
    assert len(shares) == 2 * len(finest_transformers(model.unet)) and set(shares) == {0.5}
    assert merged.image.tobytes() != plain.image.tobytes()
    assert merged.request.record()["merge_tokens"] == 0.5 and merged.notes == plain.notes
    (again,) = model.generate(merged.request)
    assert again.image.tobytes() == merged.image.tobytes()
    (both,) = model.generate("x", **fields, merge_tokens=0.5, reuse=2)
    assert both.image.tobytes() != merged.image.tobytes()


def test_a_model_without_attention_has_no_use_for_it():
    unet = random_system(tiny(small_upsampler())).unet
    assert finest_transformers(unet) == [] and merging_tokens(unet, 0.5) is unet

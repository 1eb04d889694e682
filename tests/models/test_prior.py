"""The priors: one against diffusers' on the same weights, both for what they may and may not look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor, nn

from ldm.models.autoregressive_prior import AutoregressivePrior, Speller
from ldm.models.prior import Codes, Prior, PriorConfig
from ldm.types import Conditioning

CONFIG = PriorConfig(projection=24, text_width=24, tokens=9, width=32, layers=3, heads=4)
CODES = replace(CONFIG, text_width=12, codes=Codes(components=6, buckets=10, similarities=4))
Randomize = Callable[..., nn.Module]

THEIRS = {
    "proj_in": "image_in", "embedding_proj": "reader.vector_in", "encoder_hidden_states_proj": "reader.text_in",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "norm_out": "reader.ln_final", "proj_to_clip_embeddings": "out",
    "transformer_blocks": "reader.transformer.resblocks", "norm1": "ln_1", "norm3": "ln_2",
    "attn1.to_out.0": "attn.out_proj", "ff.net.0.proj": "mlp.c_fc", "ff.net.2": "mlp.c_proj",
}  # fmt: skip
"""diffusers' names, or parts of them, and ours."""


def theirs_as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of their network under our names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for part, new in THEIRS.items():
            name = name.replace(part, new)
        ours[name] = tensor
    for index in range(CONFIG.layers):
        home = f"reader.transformer.resblocks.{index}.attn."
        for kind in ("weight", "bias"):
            ours[f"{home}in_proj_{kind}"] = torch.cat([ours.pop(f"{home[:-5]}attn1.to_{q}.{kind}") for q in "qkv"])
    ours["reader.positional_embedding"] = ours.pop("positional_embedding")[0]
    ours["query"] = ours.pop("prd_embedding")[0, 0]
    ours["data_mean"], ours["data_std"] = ours.pop("clip_mean")[0], ours.pop("clip_std")[0]
    return ours


def told(config: PriorConfig, lengths: list[int], tokens: int = 9) -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    batch = len(lengths)
    return Conditioning(
        cross=torch.randn(batch, tokens, config.text_width, generator=generator),
        vector=torch.randn(batch, config.projection, generator=generator),
        words=torch.arange(tokens)[None] < torch.tensor(lengths)[:, None],
    )


@pytest.fixture
def pair(randomize: Randomize) -> tuple[Prior, PriorTransformer]:
    theirs = PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=24, num_embeddings=9
    )
    randomize(theirs, 1)
    with torch.no_grad():
        assert theirs.prd_embedding is not None
        theirs.positional_embedding.normal_()
        theirs.prd_embedding.normal_()
    ours = Prior(CONFIG)
    ours.load_state_dict(theirs_as_ours(theirs.state_dict()), strict=True)
    return ours.eval(), theirs


@torch.no_grad()
def test_it_is_diffusers_network(
    pair: tuple[Prior, PriorTransformer], relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    ours, theirs = pair
    cond = told(CONFIG, [9, 2, 5])
    assert cond.words is not None
    x, timestep = torch.randn(3, 24), torch.tensor([0, 500, 999])
    expected = theirs(x, timestep, cond.vector, cond.cross, cond.words).predicted_image_embedding
    found = ours(x, timestep, cond)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(ours.from_unit(found), theirs.post_process_latents(expected)) < 1e-5
    torch.testing.assert_close(ours.to_unit(ours.from_unit(x)), x, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_padding_can_be_left_away(pair: tuple[Prior, PriorTransformer]) -> None:
    ours, _ = pair
    cond = told(CONFIG, [4, 2])
    assert cond.cross is not None and cond.words is not None
    x, timestep = torch.randn(2, 24), torch.tensor([10, 700])
    short = cond.with_(cross=cond.cross[:, :4], words=cond.words[:, :4])
    other = cond.with_(cross=torch.where(cond.words[..., None], cond.cross, 7.0))
    expected = ours(x, timestep, cond)
    torch.testing.assert_close(ours(x, timestep, short), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, timestep, other), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(x, timestep, cond.with_(words=None)), expected, atol=1e-2), "padding is not text"


@torch.no_grad()
def test_a_later_code_changes_no_earlier_logit(randomize: Randomize) -> None:
    prior = AutoregressivePrior(CODES)
    randomize(prior, 2)
    cond, similarity = told(CODES, [3, 9]), torch.tensor([1, 4])
    codes = torch.randint(10, (2, 5))
    logits = prior(codes, similarity, cond)
    assert logits.shape == (2, 6, 10)
    for place in range(5):
        changed = codes.clone()
        changed[:, place] = (codes[:, place] + 1) % 10
        differs = (prior(changed, similarity, cond) - logits).abs().amax(dim=(0, 2)) > 1e-4
        assert differs.tolist() == [False] * (place + 1) + [True] * (5 - place)
        torch.testing.assert_close(prior(codes[:, :place], similarity, cond), logits[:, : place + 1])
    differs = (prior(codes, similarity - 1, cond) - logits).abs().amax(dim=(0, 2)) > 1e-4
    assert differs.all(), "the similarity stands before all codes"


def test_codes_lose_half_a_bucket_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    speller = Speller(Codes(24, buckets=50, similarities=5), 24)
    speller.load_state_dict(
        speller.state_dict() | {"mean": torch.randn(24), "directions": basis, "low": torch.full((24,), -2.0)}
    )
    inside = torch.rand(200, 24, generator=generator) * 3 - 2  # components in low..high
    embedding = speller.mean + inside @ basis
    codes = speller.encode(embedding)
    assert codes.min() == 0 and codes.max() == 49
    errors = ((speller.decode(codes) - speller.mean) @ basis.T - inside).abs()
    assert errors.max() <= 3 / 50 / 2 + 1e-4
    assert errors.max() > 0.9 * 3 / 50 / 2, "no finer than it must be"
    assert torch.equal(speller.encode(speller.decode(codes)), codes)
    beyond = speller.encode(speller.mean + torch.full((1, 24), 100.0) @ basis)
    assert torch.equal(beyond, torch.full((1, 24), 49))


def test_similarities_fall_into_their_buckets() -> None:
    speller = Speller(Codes(4, similarities=4), 8)  # edges at -0.5, 0 and 0.5
    text = torch.zeros(5, 8)
    text[:, 0] = 2.0
    cosines = torch.tensor([-0.9, -0.4, 0.1, 0.6, 1.0])
    picture = torch.zeros(5, 8)
    picture[:, 0], picture[:, 1] = 3 * cosines, 3 * (1 - cosines**2).sqrt()
    assert speller.similarity(text, picture).tolist() == [0, 1, 2, 3, 3]

"""The decoder's objective: what the network is told, where it begins, and that it learns to look at the embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import scaled_linear
from ldm.models.image_conditioner import ImageTokens
from ldm.models.image_encoder import ImageConfig, ImageTower
from ldm.models.noise_augmentor import NoiseAugmentor
from ldm.models.unet import UNet, UNetConfig
from ldm.training.dalle2.decoder import (
    DecoderObjective,
    augmentor_of,
    encode_embeddings,
    first_tokens,
    kept_embeddings,
    plain_tokens,
    widened,
)
from ldm.training.diffusion import DiffusionObjective, LatentPictures
from ldm.training.engine.objective import Draw
from ldm.training.whitening import TextWhitening, Whitening, fold, unfold, whitening_of
from ldm.types import Conditioning

WIDTH, EMBEDDING, KINDS = 16, 8, 4
NARROW = UNetConfig(
    model_channels=32, channel_mult=(1,), res_blocks=1, attention=(1,), cross_only=(False,), context_width=WIDTH,
    heads=None, head_width=16, linear_projections=True, vector_width=WIDTH,
)  # fmt: skip
WIDE = UNetConfig(**{**NARROW.__dict__, "vector_width": WIDTH + 2 * EMBEDDING})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(width: int) -> Whitening:
    return Whitening(torch.zeros(width), torch.eye(width))


@pytest.fixture
def data() -> LatentPictures:
    """80 pictures of four kinds, each kind with a latent of its own; captions say nothing."""
    kinds = np.arange(80) % KINDS
    latents = noise(KINDS, 4, 1, 1).numpy()[kinds] + 0.05 * noise(80, 4, 4, 4, seed=1).numpy()
    states, pooled = noise(1, 7, WIDTH).repeat(81, 1, 1).numpy(), noise(1, WIDTH).repeat(81, 1).numpy()
    flips = np.arange(80) % 2 == 0
    return LatentPictures(latents, flips, states, pooled, np.arange(81), TextWhitening(same(WIDTH), same(WIDTH)))


@pytest.fixture
def embeddings() -> np.ndarray:
    """Near one vector for each kind; mirrored ones are marked by their last number."""
    found = noise(KINDS, 1, EMBEDDING, seed=2).repeat(20, 2, 1) * 2 + 0.1 * noise(80, 2, EMBEDDING, seed=3)
    found[:, 0, -1], found[:, 1, -1] = 1, -1
    return found.numpy().astype(np.float16)


@pytest.fixture
def objective(data: LatentPictures, embeddings: np.ndarray) -> DecoderObjective:
    torch.manual_seed(0)
    unet = widened(UNet(NARROW), WIDE)
    diffusion = DiffusionObjective(unet, scaled_linear(), "v", data, range(0, 80, 10), drop=0.5)
    tokens = first_tokens(EMBEDDING, torch.from_numpy(data.states[-1, -4:]))
    return DecoderObjective(diffusion, tokens, augmentor_of(embeddings), embeddings)


@pytest.fixture
def unet() -> UNet:
    """A finished U-Net in float64: no layer of it is zero."""
    torch.manual_seed(0)
    unet = UNet(NARROW).double()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def answer(unet: UNet, cross: Tensor, vector: Tensor) -> Tensor:
    with torch.no_grad():
        x = noise(len(cross), 4, 4, 4, seed=5).double()
        return unet(x, torch.full((len(cross),), 300.0), Conditioning(cross=cross.double(), vector=vector.double()))


class TestBeginning:
    def test_a_wider_vector_changes_nothing_whatever_it_holds(self, unet: UNet) -> None:
        wider = widened(unet, WIDE).double()
        cross, pooled = noise(3, 7, WIDTH), noise(3, WIDTH, seed=1)
        for seen in (torch.zeros(3, 2 * EMBEDDING), noise(3, 2 * EMBEDDING, seed=2)):
            got = answer(wider, cross, torch.cat([pooled, seen], dim=1))
            torch.testing.assert_close(got, answer(unet, cross, pooled), rtol=1e-12, atol=1e-12)

    def test_the_first_tokens_of_no_picture_are_paddings(self, unet: UNet) -> None:
        """Behind a text that is padding only, more of the same padding is not noticed at all."""
        padding = noise(1, 1, WIDTH)
        tokens = first_tokens(EMBEDDING, padding[0].expand(4, -1))
        text, pooled = padding.expand(2, 7, -1), noise(2, WIDTH, seed=1)
        longer = torch.cat([text, tokens(torch.zeros(2, 2 * EMBEDDING)).detach()], dim=1)
        torch.testing.assert_close(answer(unet, longer, pooled), answer(unet, text, pooled), rtol=1e-12, atol=1e-12)

    def test_the_first_tokens_of_pictures_lie_near_them(self) -> None:
        padding = noise(4, WIDTH)
        apart = first_tokens(192, padding)(noise(500, 384)).detach() - padding
        assert float(apart.std()) == pytest.approx(0.1, rel=0.1)


class TestBatch:
    def test_picture_and_caption_are_left_out_apart(self, objective: DecoderObjective) -> None:
        batch = objective.batch(Draw(4000, 0, torch.Generator().manual_seed(0)))
        untold = (~batch["told"]).float().mean()
        assert float(untold) == pytest.approx(0.1, abs=0.015)
        assert int(batch["level"].min()) < 10 and int(batch["level"].max()) > 989
        assert float(batch["level"].float().mean()) == pytest.approx(499.5, abs=15)

    def test_half_of_the_captions_are_left_out(self, objective: DecoderObjective) -> None:
        objective.diffusion.data.pooled[-1] = 7
        batch = objective.batch(Draw(4000, 0, torch.Generator().manual_seed(0)))
        without, untold = batch["pooled"][:, 0] == 7, ~batch["told"]
        assert float(without.float().mean()) == pytest.approx(0.5, abs=0.03)
        assert float((without & untold).float().mean()) == pytest.approx(0.05, abs=0.012), "each for itself"

    def test_a_mirrored_picture_has_the_embedding_of_the_mirrored_one(
        self, objective: DecoderObjective, embeddings: np.ndarray
    ) -> None:
        batch = objective.batch(Draw(200, 0, torch.Generator().manual_seed(0)))
        latents = torch.from_numpy(objective.diffusion.data.latents)[batch["pictures"]]
        mirrored = torch.stack(
            [torch.equal(a.flip(-1), b) * torch.ones(()) for a, b in zip(latents, batch["latents"], strict=True)]
        )
        assert 20 < mirrored.sum() < 180
        assert torch.equal(batch["embedding"][:, -1], 1 - 2 * mirrored)

    def test_the_same_step_draws_the_same(self, objective: DecoderObjective) -> None:
        one, other = (objective.batch(Draw(8, 0, torch.Generator().manual_seed(4))) for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_network_is_told_text_embedding_level_and_tokens(objective: DecoderObjective) -> None:
    told: list[Conditioning] = []
    objective.diffusion.unet.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    batch = objective.batch(Draw(6, 0, torch.Generator().manual_seed(0)))
    batch["told"] = torch.tensor([True, True, True, True, True, False])
    objective(batch)
    mean, std = objective.augmentor.data_mean, objective.augmentor.data_std
    assert mean is not None and std is not None and told[0].vector is not None and told[0].cross is not None
    alpha, sigma = (part.float()[:, None] for part in objective.levels.alpha_sigma(batch["level"]))
    noised = (alpha * (batch["embedding"] - mean) / std + sigma * batch["embedding_noise"]) * std + mean
    angles = batch["level"][:, None] * torch.exp(-torch.arange(4) * np.log(10_000) / 4)
    seen = torch.cat([noised, angles.cos(), angles.sin()], dim=1)
    seen[5] = 0
    torch.testing.assert_close(told[0].vector, torch.cat([batch["pooled"], seen], dim=1))
    torch.testing.assert_close(told[0].cross[:, 7:], objective.image_tokens(seen))
    torch.testing.assert_close(told[0].cross[:, :7], batch["states"])


def test_it_learns_to_look_at_the_embedding(objective: DecoderObjective, tmp_path: Path) -> None:
    """The caption says nothing and the latent, at these levels, hardly a thing: only the embedding tells what it is."""
    objective.diffusion.density = torch.zeros(1000).double()
    objective.diffusion.density[900:] = 0.01
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        loss = objective(objective.batch(Draw(32, 0, torch.Generator().manual_seed(step))))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    told = torch.ones(64, dtype=torch.bool)
    draw = Draw(64, 0, torch.Generator().manual_seed(999))
    right = objective.batch(draw) | {"told": told, "level": torch.zeros(64).long()}
    wrong = right | {"embedding": right["embedding"].roll(1, dims=0)}
    with torch.no_grad():
        seen, misled, blind = (float(objective.loss(b).mean()) for b in (right, wrong, right | {"told": ~told}))
        figures = objective.evaluate(tmp_path, 150)
    assert seen < 0.5 * blind and seen < 0.25 * misled
    assert figures["held_out"] < figures["no_picture"] and figures["held_out"] < figures["other_picture"]


def test_tokens_and_network_learned_on_white_text_say_the_same_on_plain_text(unet: UNet) -> None:
    states = noise(4000, WIDTH, seed=7) * torch.logspace(-1, 1, WIDTH) + 3
    found = whitening_of(states)
    white = Whitening(found.mean.double(), found.matrix.double())
    whitening = TextWhitening(white, white)
    wide, tokens = widened(unet, WIDE).double(), ImageTokens(EMBEDDING, 4, WIDTH).double()
    torch.nn.init.normal_(wide.get_parameter("label_emb.0.0.weight"), std=0.2)
    text, pooled, seen = (
        states[:14].reshape(2, 7, WIDTH).double(),
        states[20:22].double(),
        noise(2, 2 * EMBEDDING).double(),
    )

    def say(text: Tensor, pooled: Tensor, tokens: ImageTokens) -> Tensor:
        return answer(wide, torch.cat([text, tokens(seen).detach()], dim=1), torch.cat([pooled, seen], dim=1))

    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    wanted = say(white(text), white(pooled), tokens)
    fold(wide, whitening)
    torch.testing.assert_close(say(text, pooled, plain_tokens(tokens, white)), wanted, rtol=1e-8, atol=1e-8)
    unfold(wide, whitening)
    for name, tensor in wide.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-8, atol=1e-8)


def test_embeddings_of_pictures_and_of_them_mirrored() -> None:
    torch.manual_seed(0)
    tower = ImageTower(ImageConfig(32, 1, 2, projection=EMBEDDING, patch=8, size=16, resample="box")).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = encode_embeddings(tower, pictures, batch=2).astype(np.float32)
    assert found.shape == (3, 2, EMBEDDING)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), EMBEDDING**0.5, rtol=2e-3)
    turned = encode_embeddings(tower, pictures[:, :, ::-1]).astype(np.float32)
    np.testing.assert_allclose(turned[:, 0], found[:, 1], atol=5e-3)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.01


def test_kept_embeddings_are_of_this_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ImageConfig(32, 1, 2, projection=EMBEDDING, patch=8, size=16, resample="box")
    one, other = ImageTower(config).eval(), ImageTower(config).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "embeddings.npy"
    np.save(path, np.zeros((3, 2, EMBEDDING), np.float16))  # nobody knows whose
    first = kept_embeddings(path, one, pictures).copy()
    np.testing.assert_array_equal(first, encode_embeddings(one, pictures))
    np.testing.assert_array_equal(kept_embeddings(path, other, pictures), encode_embeddings(other, pictures))
    np.testing.assert_array_equal(kept_embeddings(path, one, pictures), first)
    assert len(kept_embeddings(path, one, pictures[:2])) == 2
    kept_embeddings(path, one, pictures)
    monkeypatch.setattr("ldm.training.dalle2.decoder.encode_embeddings", None)
    np.testing.assert_array_equal(kept_embeddings(path, one, pictures), first)


def test_the_augmentor_knows_mean_and_deviation(embeddings: np.ndarray) -> None:
    augmentor: NoiseAugmentor = augmentor_of(embeddings)
    rows = embeddings.astype(np.float64).reshape(-1, EMBEDDING)
    assert augmentor.data_mean is not None and augmentor.data_std is not None
    np.testing.assert_allclose(augmentor.data_mean[0].numpy(), rows.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(augmentor.data_std[0].numpy(), rows.std(axis=0, ddof=1), atol=2e-3)
    assert list(augmentor.state_dict()) == ["data_mean", "data_std"]

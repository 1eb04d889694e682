"""Each objective against its published formula, worked out independently in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.loss import snr_weight
from ldm.diffusion.schedule import scaled_linear
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.unet import UNet, UNetConfig
from ldm.training.autoencoder import AutoencoderLoss, AutoencoderObjective, VAEDecoderObjective, to_unit
from ldm.training.diffusion import DiffusionObjective, LatentPictures
from ldm.training.engine.objective import Draw
from ldm.training.latents import centre_latents
from ldm.training.whitening import TextWhitening, Whitening
from ldm.types import Conditioning


def pictures(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(8, (1, 1, 1, 2), 1, norm_groups=2))


class TestAutoencoder:
    def test_loss_is_the_sum_that_the_docstring_promises(self, autoencoder: AutoencoderKL) -> None:
        objective = AutoencoderObjective(
            autoencoder, pictures(4), np.arange(3), np.arange(3, 4), 32, AutoencoderLoss(0.7, 0.6, 0.5, 0.1)
        )
        images, noise = to_unit(pictures(2)), torch.randn(2, 4, 4, 4)
        got = objective.losses(images, noise, "none")
        with torch.no_grad():
            posterior = autoencoder.posterior(images)
            decoded = autoencoder.reconstruct(posterior.mean + (0.5 * posterior.log_variance).exp() * noise)
        a, b = decoded.double().numpy(), images.double().numpy()
        mean, logvar = posterior.mean.double().numpy(), posterior.log_variance.double().numpy()
        right = np.abs(np.diff(a, axis=3)[:, :, :-1] - np.diff(b, axis=3)[:, :, :-1])
        down = np.abs(np.diff(a, axis=2)[..., :-1] - np.diff(b, axis=2)[..., :-1])
        coarse = np.abs((a - b).reshape(2, 3, 4, 8, 4, 8).mean(axis=(3, 5))).mean()
        hues = np.abs(np.diff(a, axis=1) - np.diff(b, axis=1)).mean()
        kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
        want = np.abs(a - b).mean() + 0.7 * (right.mean() + down.mean()) / 2 + 0.6 * hues + 0.5 * coarse + 0.1 * kl
        assert got["loss"].item() == pytest.approx(want, rel=1e-5)

    @pytest.mark.parametrize(("transform", "side"), [("halve", 16), ("mirror", 32)])
    def test_the_latent_is_transformed_and_the_picture_with_it(
        self, autoencoder: AutoencoderKL, transform: str, side: int
    ) -> None:
        objective = AutoencoderObjective(
            autoencoder, pictures(4), np.arange(3), np.arange(3, 4), 32, AutoencoderLoss(0, 0, 0, 0)
        )
        images = to_unit(pictures(1))
        with torch.no_grad():
            z = autoencoder.posterior(images).mean
            moved = z.flip(-1) if transform == "mirror" else z.reshape(1, 4, 2, 2, 2, 2).mean(dim=(3, 5))
            target = images.flip(-1) if transform == "mirror" else images.reshape(1, 3, 16, 2, 16, 2).mean(dim=(3, 5))
            assert target.shape[-1] == side
            want = (autoencoder.reconstruct(moved) - target).abs().mean()
            zero = torch.full_like(z, 0.0)
            got = objective.losses(images, zero, transform)["loss"]  # type: ignore[arg-type]
        assert float(got) == pytest.approx(float(want), rel=1e-5)

    def test_held_out_pictures_are_not_drawn(self, autoencoder: AutoencoderKL) -> None:
        numbered = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
        objective = AutoencoderObjective(autoencoder, numbered, np.arange(1, 8), np.array([0]), 16, AutoencoderLoss())
        images = objective.batch(Draw(200, 0, torch.Generator().manual_seed(0)))["images"]
        assert set(((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) == set(range(1, 8))

    def test_centring_changes_latents_and_not_pictures(self, autoencoder: AutoencoderKL) -> None:
        images = to_unit(pictures(8))
        with torch.no_grad():
            before = autoencoder.posterior(images)
            picture, spread = autoencoder.reconstruct(before.mean), before.log_variance
        centre_latents(autoencoder, pictures(8))
        with torch.no_grad():
            after = autoencoder.posterior(images)
            assert torch.allclose(autoencoder.reconstruct(after.mean), picture, atol=1e-5)
        assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5)
        assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5)
        deviation = before.mean.std(dim=(0, 2, 3))
        assert torch.allclose(after.log_variance, spread - 2 * deviation.log()[:, None, None], atol=1e-4)


class TestVAEDecoder:
    def test_it_learns_the_decoder_alone_from_latents_that_are_off(self, autoencoder: AutoencoderKL) -> None:
        network = copy.deepcopy(autoencoder)
        objective = VAEDecoderObjective(
            network, pictures(4), np.arange(3), np.arange(3, 4), AutoencoderLoss(0.7, 0.6, 0.5, 0.1), noise=0.5
        )
        batch = objective.batch(Draw(2, 0, torch.Generator().manual_seed(0)))
        assert batch["level"].min() >= 0 and batch["level"].max() <= 0.5
        got = objective(batch)
        with torch.no_grad():
            latents = autoencoder.posterior(batch["images"]).mean
            latents = latents + batch["level"].reshape(2, 1, 1, 1) * batch["noise"] / autoencoder.config.scale_factor
            decoded = autoencoder.reconstruct(latents)
        assert got["pixels"].item() == pytest.approx(float((decoded - batch["images"]).abs().mean()), rel=1e-5)
        parts = [got[name].item() for name in ("pixels", "edges", "hues", "coarse")]
        assert got["loss"].item() == pytest.approx(sum(np.multiply(parts, (1, 0.7, 0.6, 0.5))), rel=1e-5)
        got["loss"].backward()
        moved = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
        assert moved == {"decoder", "post_quant_conv"}

    def test_what_is_measured(self, autoencoder: AutoencoderKL, tmp_path: Path) -> None:
        objective = VAEDecoderObjective(
            copy.deepcopy(autoencoder), pictures(20), np.arange(2), np.arange(2, 20), AutoencoderLoss(), noise=0.4
        )
        with torch.no_grad():
            found = objective.evaluate(tmp_path, 3)
        images = to_unit(pictures(20)[2:])
        with torch.no_grad():
            off = autoencoder.reconstruct(autoencoder.posterior(images).mean).clamp(-1, 1) - images
        exact = float(-10 * (off / 2).square().flatten(1).mean(dim=1).log10().mean())
        assert list(found) == ["psnr_0", "psnr_0.2", "psnr_0.4"]
        assert found["psnr_0"] == pytest.approx(exact, abs=0.05)
        assert (tmp_path / "reconstruction-000003.png").exists()


def latent_pictures(count: int = 10) -> LatentPictures:
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(count, 4, 8, 8)).astype(np.float16)
    flips = np.arange(count) % 2 == 1
    caption = np.append(np.arange(3 * count), -1).astype(np.float16)  # the last one is none
    states = caption[:, None, None] * np.ones((1, 5, 6), np.float16)
    pooled = caption[:, None] * np.full((1, 4), 2, np.float16)
    whitening = TextWhitening(*(Whitening(torch.zeros(width), torch.eye(width)) for width in (6, 4)))
    return LatentPictures(latents, flips, states, pooled, np.arange(count + 1) * 3, whitening)


class Oracle(UNet):
    """Knows what the noise was."""

    answer: Tensor

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.answer


class TestDiffusion:
    @pytest.fixture
    def objective(self) -> DiffusionObjective:
        config = UNetConfig(
            model_channels=32, channel_mult=(1,), attention=(0,), cross_only=(False,), res_blocks=1, context_width=6
        )
        return DiffusionObjective(Oracle(config), scaled_linear(), "v", latent_pictures(), [9])

    def test_loss_is_the_published_one(self, objective: DiffusionObjective) -> None:
        batch = objective.batch(Draw(16, 0, torch.Generator().manual_seed(0)))
        objective.unet.answer = torch.full((16, 4, 8, 8), 0.25)
        got = objective.loss(batch).double().numpy()
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alpha2 = np.cumprod(1 - betas)[batch["timestep"].numpy()][:, None, None, None]
        velocity = np.sqrt(alpha2) * batch["noise"].double().numpy() - np.sqrt(1 - alpha2) * batch["latents"].numpy()
        snr = (alpha2 / (1 - alpha2))[:, 0, 0, 0]
        want = ((velocity - 0.25) ** 2).mean(axis=(1, 2, 3)) * np.minimum(snr + 1, 5.0) / (snr + 1)
        assert got * batch["density"].numpy() == pytest.approx(want, rel=1e-4)

    def test_noise_levels_that_count_are_drawn_more_often(self, objective: DiffusionObjective) -> None:
        batch = objective.batch(Draw(40_000, 0, torch.Generator().manual_seed(0)))
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        snr = np.cumprod(1 - betas) / (1 - np.cumprod(1 - betas))
        weight = np.minimum(snr + 1, 5.0) / (snr + 1)
        want = (0.5 + 0.5 * weight / weight.mean()).reshape(10, 100).mean(axis=1) / 10
        found, _ = np.histogram(batch["timestep"].numpy(), bins=10, range=(0, 1000))
        assert found / 40_000 == pytest.approx(want, abs=0.006)
        drawn_weight = weight[batch["timestep"].numpy()] / batch["density"].numpy()
        assert drawn_weight.mean() == pytest.approx(weight.mean(), rel=0.01), "the loss keeps its mean"
        even = weight[np.random.default_rng(0).integers(0, 1000, 40_000)]
        assert drawn_weight.std() < 0.7 * even.std(), "and varies less"

    def test_a_network_that_knows_the_answer_has_no_loss(self, objective: DiffusionObjective) -> None:
        batch = objective.batch(Draw(4, 0, torch.Generator().manual_seed(1)))
        alpha2 = scaled_linear().alphas_cumprod[batch["timestep"]].float()[:, None, None, None]
        objective.unet.answer = alpha2.sqrt() * batch["noise"] - (1 - alpha2).sqrt() * batch["latents"]
        assert float(objective(batch)["loss"]) < 1e-10

    def test_batches_keep_their_promises(self, objective: DiffusionObjective) -> None:
        batch = objective.batch(Draw(4000, 0, torch.Generator().manual_seed(2)))
        caption = batch["states"][:, 0, 0]
        dropped = caption == -1
        assert torch.equal(batch["pooled"], (2 * caption)[:, None].expand(-1, 4)), "the same caption"
        assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
        picture = (caption // 3).long()
        assert set(picture[~dropped].tolist()) == set(range(9)), "all pictures but the held-out one"
        assert len(set((caption[~dropped] % 3).tolist())) == 3, "all captions"
        latents = torch.from_numpy(objective.data.latents).float()
        same = (batch["latents"] == latents[picture]).flatten(1).all(dim=1)
        turned = (batch["latents"] == latents[picture].flip(-1)).flatten(1).all(dim=1)
        odd = picture % 2 == 1
        assert bool(same[~dropped & ~odd].all()), "pictures that must not be mirrored are not"
        assert float(turned[~dropped & odd].float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_snr_weights_agree_across_predictions(floor: float) -> None:
    """An error of x0 costs the same whichever way the network states it."""
    sigma = torch.tensor([0.05, 0.3, 1.0, 14.0], dtype=torch.float64)
    x0, eps, v = (snr_weight(sigma, kind, floor=floor) for kind in ("x0", "eps", "v"))  # type: ignore[arg-type]
    assert torch.allclose(eps, x0 * sigma**2)
    assert torch.allclose(v, x0 * sigma**2 / (sigma**2 + 1))
    assert torch.allclose(x0, torch.minimum(sigma**-2 + floor, torch.tensor(5.0, dtype=torch.float64)))

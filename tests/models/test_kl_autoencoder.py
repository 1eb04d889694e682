"""The KL autoencoder against diffusers', and its Gaussian against torch's distributions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.presets import sd1, sd_x4_upscaler, sdxl, small, tiny

CONFIGS = {
    "sd": tiny(sd1()).autoencoder,
    "x4-upscaler": tiny(sd_x4_upscaler()).autoencoder,
    "small": replace(small().autoencoder, base_channels=4),
    "grey, deeper blocks, no downsampling": AutoencoderConfig(
        8, (1,), 3, latent_channels=2, image_channels=1, norm_groups=4
    ),
    "wide latent, shifted": AutoencoderConfig(8, (1, 3), 1, latent_channels=16, norm_groups=2, shift_factor=0.1),
}
CASES = [
    pytest.param((32, 24), torch.float32, 1e-4, id="float32"),
    pytest.param((37, 29), torch.float32, 1e-4, id="float32, odd sides"),
    pytest.param((16, 24), torch.float64, 1e-8, id="float64"),  # shows what float32 hides, such as the eps of a norm
]


def diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The same autoencoder as diffusers describes it."""
    levels = len(config.channel_mult)
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.norm_groups,
    }


def converted(autoencoder: AutoencoderKL, config: dict[str, Any]) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, by diffusers' converter."""
    checkpoint = {f"first_stage_model.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    return convert_ldm_vae_checkpoint(checkpoint, config)


@pytest.mark.parametrize(("side", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_moments_and_pictures_equal_diffusers(name, side, dtype, tolerance, randomize, relative_error):
    config = CONFIGS[name]
    ours = randomize(AutoencoderKL(config)).to(dtype)
    theirs = DiffusersAutoencoderKL(**diffusers_config(config)).eval().to(dtype)
    theirs.load_state_dict(converted(ours, diffusers_config(config)))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, config.image_channels, *side, generator=generator).to(dtype) * 2 - 1
    posterior, expected = ours.posterior(images), theirs.encode(images).latent_dist
    assert relative_error(posterior.mean, expected.mean) < tolerance
    assert relative_error(posterior.log_variance, expected.logvar) < tolerance
    z = torch.randn(posterior.mean.shape, generator=generator).to(dtype)
    assert relative_error(ours.reconstruct(z), theirs.decode(z).sample) < tolerance


def published(widths: tuple[int, ...]) -> dict[str, Any]:
    """What diffusers publishes for Stable Diffusion's autoencoders, the rest being its defaults."""
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2,
        "latent_channels": 4,
    }


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (sd1().autoencoder, published((128, 256, 512, 512))),
        (sdxl().autoencoder, published((128, 256, 512, 512))),
        (sd_x4_upscaler().autoencoder, published((128, 256, 512))),
    ],
    ids=["sd", "sdxl", "x4-upscaler"],
)
def test_full_size_names_and_shapes(config, published):
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), DiffusersAutoencoderKL(**published)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in converted(ours, published).items()} == expected


@torch.inference_mode()
def test_log_variance_is_kept_in_bounds(randomize):
    autoencoder = randomize(AutoencoderKL(CONFIGS["sd"]))
    autoencoder.quant_conv.bias[4:6] = torch.tensor([-1e3, 1e3])
    log_variance = autoencoder.posterior(torch.zeros(1, 3, 16, 16)).log_variance
    assert (log_variance[:, 0] == -30).all() and (log_variance[:, 1] == 20).all()


@torch.inference_mode()
def test_latents_are_shifted_and_scaled_both_ways(randomize):
    autoencoder = randomize(AutoencoderKL(replace(CONFIGS["sd"], scale_factor=0.5, shift_factor=3.0)))
    images = torch.rand(1, 3, 16, 16)
    mean = autoencoder.posterior(images).mean
    latents = autoencoder.encode(images)
    assert torch.allclose(latents, (mean - 3.0) * 0.5)
    assert torch.allclose(autoencoder.decode(latents), autoencoder.reconstruct(mean), atol=1e-4)
    sampled = autoencoder.encode(images, torch.Generator().manual_seed(0))
    drawn = autoencoder.posterior(images).sample(torch.Generator().manual_seed(0))
    assert torch.equal(sampled, (drawn - 3.0) * 0.5) and not torch.equal(sampled, latents)


def test_stable_diffusion_has_its_known_total():
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderKL(AutoencoderConfig()).parameters()) == 83_653_863


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_downsampling_is_the_ratio_of_sides(config):
    f, z, channels = config.downsampling, config.latent_channels, config.image_channels
    with torch.device("meta"):
        autoencoder = AutoencoderKL(config)
        assert autoencoder.posterior(torch.empty(1, channels, 48, 32)).mean.shape == (1, z, 48 // f, 32 // f)
        assert autoencoder.reconstruct(torch.empty(1, z, 6, 4)).shape == (1, channels, 6 * f, 4 * f)


def gaussian() -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 4, 5, 6, generator=generator).unbind()
    return DiagonalGaussian(mean, log_variance)


def test_kl_equals_torch_distributions():
    ours = gaussian()
    theirs = kl_divergence(Normal(ours.mean, (ours.log_variance / 2).exp()), Normal(0.0, 1.0))
    assert ours.kl().shape == (3,)
    assert torch.allclose(ours.kl(), theirs.sum(dim=(1, 2, 3)))


def test_kl_of_the_standard_normal_is_zero():
    assert torch.equal(DiagonalGaussian(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).kl(), torch.zeros(2))


def test_samples_have_the_mean_and_variance():
    mean, log_variance, count = torch.tensor([-2.0, 0.5]), torch.tensor([-1.0, 1.5]), 100_000
    many = DiagonalGaussian(mean.expand(count, 2), log_variance.expand(count, 2))
    sample = many.sample(torch.Generator().manual_seed(0))
    deviation = (log_variance / 2).exp()
    assert ((sample.mean(0) - mean).abs() < 4 * deviation / count**0.5).all()
    assert ((sample.var(0) / log_variance.exp() - 1).abs() < 4 * (2 / count) ** 0.5).all()


def test_samples_follow_the_generator_in_every_dtype():
    ours = gaussian()
    once, again = (ours.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, ours.sample(torch.Generator().manual_seed(6)))
    half = DiagonalGaussian(ours.mean.bfloat16(), ours.log_variance.bfloat16()).sample(torch.Generator().manual_seed(5))
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), once, rtol=0.05, atol=0.05)


def test_mode_is_the_densest_point():
    ours = gaussian()
    density = Normal(ours.mean, (ours.log_variance / 2).exp()).log_prob
    assert (density(ours.mode()) > density(ours.mode() + 0.01)).all()
    assert (density(ours.mode()) > density(ours.mode() - 0.01)).all()

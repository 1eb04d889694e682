"""The autoencoder in tiles against the same autoencoder whole."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.tiled import decode_tiled, in_files, in_memory, posterior_tiled

CONFIGS = {
    "sd": AutoencoderConfig(base_channels=32, channel_mult=(1, 2, 2)),
    "wide": AutoencoderConfig(
        base_channels=16, channel_mult=(1, 3, 2, 4), res_blocks=1, norm_groups=8, latent_channels=6
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def autoencoder(request: pytest.FixtureRequest) -> AutoencoderKL:
    torch.manual_seed(0)
    network = AutoencoderKL(CONFIGS[request.param]).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))  # or a norm that is left out would hardly show
    return network


def picture(height: int, width: int) -> Tensor:
    """Not the same everywhere, so that a tile's mean is not the picture's."""
    noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * torch.linspace(0, 2, width) - 1).clamp(-1, 1)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (88, 136), (40, 24)])
@pytest.mark.parametrize("tile", [16, 23, 48])
def test_tiled_is_whole(height, width, tile, autoencoder):
    images = picture(height, width)
    posterior = autoencoder.posterior(images)
    tiled = posterior_tiled(autoencoder, images, tile)
    assert off(tiled.mean, posterior.mean) < 1e-5
    assert off(tiled.log_variance, posterior.log_variance) < 1e-5
    latents = autoencoder.encode(images)
    kept = latents.clone()
    assert off(decode_tiled(autoencoder, latents, tile), autoencoder.decode(latents)) < 1e-5
    assert torch.equal(latents, kept)


def test_tiles_by_themselves_are_not(autoencoder):
    """What the others do: the test above would see it."""
    latents = autoencoder.encode(picture(64, 128))
    halves = torch.cat([autoencoder.decode(half) for half in latents.chunk(2, dim=3)], dim=3)
    assert off(halves, autoencoder.decode(latents)) > 0.05


def test_half_precision_is_rounded_about_as_often(autoencoder):
    latents = autoencoder.encode(picture(64, 88))
    exact = autoencoder.decode(latents)
    half = AutoencoderKL(autoencoder.config).eval().requires_grad_(False)
    half.load_state_dict(autoencoder.state_dict())
    half.bfloat16()
    error = [
        float((found.float() - exact).norm())
        for found in (decode_tiled(half, latents.bfloat16(), 24), half.decode(latents.bfloat16()))
    ]
    assert error[0] < 1.2 * error[1]


def test_activations_wait_in_files_that_go(autoencoder, tmp_path):
    images = picture(48, 64)
    with in_files(tmp_path) as store:
        assert torch.equal(
            posterior_tiled(autoencoder, images, 16, store).mean, posterior_tiled(autoencoder, images, 16).mean
        )
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="inside"), in_files(tmp_path) as store:
        store((2, 3), torch.float32).fill_(1.0)
        raise RuntimeError("inside")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with in_files(tmp_path) as store, pytest.raises(LdmError, match=r"no room for the tiles .*No space left.*TMPDIR"):
        store((2, 3), torch.float32)
    assert not list(tmp_path.iterdir())


def test_the_device_holds_a_tile(autoencoder, monkeypatch):
    """No convolution behind the middle sees more than a tile and its rim."""
    latents = autoencoder.encode(picture(128, 128))
    seen: list[int] = []
    convolve = torch.nn.functional.conv2d

    def watched(x: Tensor, *args, **options) -> Tensor:
        seen.append(max(x.shape[2:]))
        return convolve(x, *args, **options)

    middle = max(latents.shape[2:])
    monkeypatch.setattr("ldm.models.tiled.F.conv2d", watched)
    decode_tiled(autoencoder, latents, 16, in_memory)
    assert max(seen) <= max(16 + 2, middle)


def test_a_tile_that_is_too_small(autoencoder):
    with pytest.raises(LdmError, match="vae_tile: found 8, expected 16 or more"):
        decode_tiled(autoencoder, torch.zeros(1, autoencoder.config.latent_channels, 8, 8), 8)

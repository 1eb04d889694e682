"""Previews: of a decoder that is linear the fitted colours are its own, and a tiny autoencoder's are diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig, sd1, small_upsampler, tiny
from ldm.pipeline.load import load, random_system
from ldm.pipeline.preview import colours_look, tiny_look


def of_diffusers(latent_channels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = (8,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=latent_channels
    ).eval()


@torch.inference_mode()
def test_colours_of_a_linear_decoder_are_found() -> None:
    model = random_system(tiny(small_upsampler()))  # whose latents are blocks of 2 x 2 pixels
    model.autoencoder.deviation.mul_(0.2)  # for colours that are not cut
    latents = torch.randn(3, 12, 5, 7, generator=torch.Generator().manual_seed(1))
    blocks = F.avg_pool2d(model.autoencoder.decode(latents), 2)
    assert blocks.std() > 0.005
    expected = F.interpolate(blocks, scale_factor=2, mode="bilinear")
    assert torch.allclose(colours_look(model)(latents), expected, atol=1e-5)


@torch.inference_mode()
def test_a_tiny_autoencoder_shows_what_diffusers_decodes(
    tiny_file: Callable[[SystemConfig], Path], tmp_path: Path
) -> None:
    theirs, latents = of_diffusers(), torch.randn(3, 4, 5, 7)
    theirs.save_pretrained(tmp_path / "taesd")
    model = load(tiny_file(tiny(sd1())), dtype="float32")
    expected = theirs.decode(latents).sample
    assert torch.allclose(tiny_look(model, tmp_path / "taesd")(latents), expected, atol=1e-5)


def test_what_does_not_serve_is_one_line(tiny_file: Callable[[SystemConfig], Path], tmp_path: Path) -> None:
    model = load(tiny_file(tiny(sd1())))
    whole = tmp_path / "vae.safetensors"
    save_file(dict(model.autoencoder.state_dict()), whole)
    with pytest.raises(LdmError, match=f"^{whole}: is no tiny autoencoder; expected one, as TAESD"):
        tiny_look(model, whole)
    of_diffusers(latent_channels=16).save_pretrained(tmp_path / "taesd3")
    with pytest.raises(LdmError, match=r"^.*: the tiny autoencoder is for latents with 16 channels at 1/8 of the size"):
        tiny_look(model, tmp_path / "taesd3")

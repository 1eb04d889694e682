"""The first stage of pixels: its layout by hand, what bicubic enlarging gets right, and the network behind it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image

from ldm.errors import LdmError
from ldm.models.pixel_blocks import PixelBlocks, first_stage
from ldm.models.presets import small_upsampler, tiny
from ldm.models.unet import UNet
from ldm.types import Conditioning
from ldm.weights.architecture import autoencoder_config
from ldm.weights.config_json import config_from_json, config_to_json

CONFIG = small_upsampler().autoencoder


def blocks() -> PixelBlocks:
    found = first_stage(CONFIG)
    assert isinstance(found, PixelBlocks)
    found.deviation.copy_(torch.linspace(0.1, 2.0, 12))
    return found


def test_blocks_of_pixels_become_channels() -> None:
    pictures = torch.randn(2, 3, 6, 10)
    latents = blocks().encode(pictures).numpy() * np.linspace(0.1, 2.0, 12)[:, None, None]
    for colour in range(3):
        for y in range(2):
            for x in range(2):
                of_block = pictures[:, colour, y::2, x::2].numpy()
                assert latents[:, 4 * colour + 2 * y + x] == pytest.approx(of_block, rel=1e-5)
    assert torch.allclose(blocks().decode(blocks().encode(pictures)), pictures, atol=1e-6)


def test_over_a_small_picture_they_are_its_details() -> None:
    small, large = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    over = blocks().over(small)
    assert torch.allclose(over.decode(over.encode(large)), large, atol=1e-6)
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 8, 16)
    enlarged = blocks().over(ramp).decode(torch.zeros(1, 12, 8, 16))
    step = 2 / 15
    expected = -1 + step * (torch.arange(32) / 2 - 0.25)
    assert torch.allclose(enlarged[..., 6:-6], expected[6:-6].expand(1, 3, 16, 20), atol=1e-5)
    band = Image.fromarray(small[1, 2].numpy()).resize((10, 8), Image.Resampling.BICUBIC)
    enlarged = over.decode(torch.zeros(2, 12, 4, 5))
    assert enlarged[1, 2].numpy() == pytest.approx(np.asarray(band), abs=1e-5)
    assert not torch.allclose(blocks().over(small).encode(large), blocks().encode(large)), "the plain one is untouched"


def test_shapes_tell_the_config_and_a_wrong_one_is_refused() -> None:
    shapes = {name: tuple(t.shape) for name, t in blocks().state_dict().items()}
    assert replace(autoencoder_config(shapes), scale_factor=1.0) == CONFIG
    config = small_upsampler()
    assert config_from_json(config_to_json(config)) == config
    broken = replace(config, autoencoder=replace(CONFIG, latent_channels=16))
    with pytest.raises(LdmError, match="latent_channels is 16, which blocks of 2 x 2 pixels do not give"):
        config_from_json(config_to_json(broken))


@torch.inference_mode()
def test_the_upsamplers_network_equals_diffusers(randomize, relative_error) -> None:
    config = tiny(small_upsampler()).unet
    ours = randomize(UNet(config))
    theirs = UNet2DModel(
        in_channels=15,
        out_channels=12,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        num_class_embeds=101,
        add_attention=False,
    ).eval()
    # Their converter takes the second part of the middle for attention, and this middle has none.
    names = {name: name.replace("middle_block.1.", "middle_block.2.") for name in ours.state_dict()}
    tensors = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in ours.state_dict().items()}
    tensors["model.diffusion_model.middle_block.1.none"] = torch.zeros(0)
    told = convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 1, "num_class_embeds": 101})
    theirs.load_state_dict({name: tensor for name, tensor in told.items() if not name.endswith("none")})
    generator = torch.Generator().manual_seed(1)
    x, small = torch.randn(2, 12, 16, 24, generator=generator), torch.randn(2, 3, 16, 24, generator=generator)
    timestep, levels = torch.tensor([17.0, 801.5]), torch.tensor([3, 100])
    output = ours(x, timestep, Conditioning(concat=small, vector=levels))
    expected = theirs(torch.cat([x, small], dim=1), timestep, class_labels=levels).sample
    assert relative_error(output, expected) < 1e-4

"""The ControlNet against diffusers', in the layouts of SD 1.x, SD 2.x and SDXL.

Weights go over by diffusers' own converter of original files, so tensor names and maths are both judged by it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, tiny
from ldm.models.unet import UNet
from ldm.types import Conditioning

TOLERANCE = 1e-4
SYSTEMS = {"sd1": sd1(), "sd2": sd2(), "sdxl": sdxl()}
MILLIONS = {"sd1": 361.28, "sd2": 364.23, "sdxl": 1251.0}
"""Parameters of the published ones."""


def their_config(system: SystemConfig) -> dict[str, Any]:
    """The arguments of diffusers' class for the same widths."""
    unet = system.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    config: dict[str, Any] = {
        "block_out_channels": tuple(widths),
        "layers_per_block": unet.res_blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.attention),
        "transformer_layers_per_block": tuple(depth or unet.middle_attention for depth in unet.attention),
        "attention_head_dim": tuple(unet.heads_for(width) for width in widths),  # their name for the number of heads
        "cross_attention_dim": unet.context_width,
        "use_linear_projection": unet.linear_projections,
    }
    if unet.vector_width is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = unet.vector_width
    return config


def converted(network: ControlNet) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, by diffusers' converter (which has no name for the vector's layers)."""
    state = network.state_dict()
    result = convert_controlnet_checkpoint(dict(state), {"layers_per_block": network.config.unet.res_blocks})
    for ours, theirs in (("0.0", "linear_1"), ("0.2", "linear_2")):
        for kind in ("weight", "bias"):
            if f"label_emb.{ours}.{kind}" in state:
                result[f"add_embedding.{theirs}.{kind}"] = state[f"label_emb.{ours}.{kind}"]
    return result


@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", SYSTEMS)
@torch.inference_mode()
def test_residuals_equal_diffusers(name, pooled, size, randomize, relative_error):
    system = tiny(SYSTEMS[name])
    ours = randomize(ControlNet(ControlNetConfig(system.unet, pooled=pooled)))
    theirs = ControlNetModel(**their_config(system), global_pool_conditions=pooled).eval()
    theirs.load_state_dict(converted(ours))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=generator)
    text = torch.randn(2, 7, system.unet.context_width or 1, generator=generator)
    hint = torch.rand(1, 3, size[0] * 8, size[1] * 8, generator=generator)
    timestep = torch.tensor([17.0, 801.5])
    vector, told = None, {}
    if system.unet.vector_width is not None:
        pooled_text = torch.randn(2, 32, generator=generator)
        numbers = torch.tensor([[1024.0, 768, 0, 16, 1024, 768]]).repeat(2, 1)
        features = get_timestep_embedding(numbers.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        vector = torch.cat([pooled_text, features.view(2, -1)], dim=1)
        told = {"added_cond_kwargs": {"text_embeds": pooled_text, "time_ids": numbers}}
    *skips, middle = ours(x, timestep, Conditioning(cross=text, vector=vector), hint)
    expected, expected_middle = theirs(x, timestep, text, hint.repeat(2, 1, 1, 1), return_dict=False, **told)
    for residual, their_residual in zip([*skips, middle], [*expected, expected_middle], strict=True):
        assert relative_error(residual, their_residual) < TOLERANCE


@pytest.mark.parametrize("name", SYSTEMS)
def test_full_size_names_shapes_and_total(name):
    with torch.device("meta"):
        ours = ControlNet(ControlNetConfig(SYSTEMS[name].unet))
        theirs = ControlNetModel(**their_config(SYSTEMS[name]))
    expected = {tensor: value.shape for tensor, value in theirs.state_dict().items()}
    assert {tensor: value.shape for tensor, value in converted(ours).items()} == expected
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.2)


@torch.inference_mode()
def test_a_new_one_changes_nothing(randomize):
    system = tiny(sd1())
    unet, control = randomize(UNet(system.unet)), ControlNet(ControlNetConfig(system.unet)).eval()
    x, timestep = torch.randn(2, 4, 9, 13, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 500.0])
    cond = Conditioning(cross=torch.ones(2, 5, 32))
    residuals = control(x, timestep, cond, torch.rand(1, 3, 72, 104))
    assert all(not residual.any() for residual in residuals)
    assert torch.equal(unet(x, timestep, cond.with_(control=residuals)), unet(x, timestep, cond))


@torch.inference_mode()
def test_channels_beside_the_latent_are_looked_at_if_there_is_room(randomize):
    system = tiny(sd1())
    x, timestep, hint = torch.ones(1, 4, 8, 8), torch.tensor([5.0]), torch.ones(1, 3, 64, 64)
    cond = Conditioning(cross=torch.ones(1, 5, 32))
    masked = cond.with_(concat=torch.ones(1, 5, 8, 8))
    four = randomize(ControlNet(ControlNetConfig(system.unet)))
    assert torch.equal(four(x, timestep, cond, hint)[0], four(x, timestep, masked, hint)[0])
    nine = randomize(ControlNet(ControlNetConfig(replace(system.unet, in_channels=9))))
    outside = cond.with_(concat=torch.zeros(1, 5, 8, 8))
    assert not torch.equal(nine(x, timestep, masked, hint)[0], nine(x, timestep, outside, hint)[0])


def test_gradients_reach_every_parameter(randomize):
    system = tiny(sdxl())
    control = randomize(ControlNet(ControlNetConfig(system.unet))).train()
    assert system.unet.vector_width is not None
    cond = Conditioning(cross=torch.ones(2, 5, 64), vector=torch.ones(2, system.unet.vector_width))
    residuals = control(torch.ones(2, 4, 8, 8), torch.tensor([5.0, 9.0]), cond, torch.rand(2, 3, 64, 64))
    torch.stack([residual.square().mean() for residual in residuals]).sum().backward()
    assert [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_part_that_the_network_needs_must_be_given():
    control = ControlNet(ControlNetConfig(tiny(sdxl()).unet))
    given = (torch.ones(1, 4, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"needs Conditioning\.cross"):
        control(*given, Conditioning(), torch.ones(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"needs Conditioning\.vector"):
        control(*given, Conditioning(cross=torch.ones(1, 5, 64)), torch.ones(1, 3, 64, 64))

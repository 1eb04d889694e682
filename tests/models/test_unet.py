"""The U-Net against diffusers', in the layouts of the published models.

Weights go over by diffusers' own converter of original checkpoints, so tensor names and maths are both judged by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ldm.models.presets import SystemConfig, sd1, sd2, sd_x4_upscaler, sdxl, sdxl_refiner, tiny
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Conditioning

WIDTH = 32
TOLERANCE = 1e-4
CASES = [
    pytest.param((16, 16), torch.float32, TOLERANCE, id="float32"),
    pytest.param((9, 13), torch.float32, TOLERANCE, id="float32, odd sides"),
    pytest.param((6, 9), torch.float64, 1e-6, id="float64"),  # shows what float32 hides, such as the eps of a norm
]


@dataclass(frozen=True)
class Layout:
    """Our preset, the config that diffusers publishes for the same model, and its parameters in millions."""

    system: SystemConfig
    diffusers: dict[str, Any] = field(default_factory=dict)
    millions: float | None = None


SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
VECTOR = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
ATTENTION_DOWN, ATTENTION_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
LAYOUTS = {
    "sd15": Layout(sd1(), {"cross_attention_dim": 768}, 859.52),
    "sd15-inpaint": Layout(sd1(in_channels=9), {"cross_attention_dim": 768, "in_channels": 9}, 859.54),
    "sd21": Layout(sd2(), SD2, 865.91),
    "sd2-inpaint": Layout(sd2(in_channels=9), {**SD2, "in_channels": 9}, 865.93),
    "sd2-depth": Layout(sd2(in_channels=5), {**SD2, "in_channels": 5}, 865.91),
    "x4-upscaler": Layout(
        sd_x4_upscaler(),
        {
            "in_channels": 7,
            "block_out_channels": (256, 512, 512, 1024),
            "down_block_types": ("DownBlock2D", ATTENTION_DOWN, ATTENTION_DOWN, ATTENTION_DOWN),
            "up_block_types": (ATTENTION_UP, ATTENTION_UP, ATTENTION_UP, "UpBlock2D"),
            "attention_head_dim": 8,
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "only_cross_attention": (True, True, True, False),
            "num_class_embeds": 1000,
        },
        473.4,
    ),
    "sdxl": Layout(
        sdxl(),
        {
            **VECTOR,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", ATTENTION_DOWN, ATTENTION_DOWN),
            "up_block_types": (ATTENTION_UP, ATTENTION_UP, "UpBlock2D"),
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        2567.46,
    ),
    "sdxl-refiner": Layout(
        sdxl_refiner(),
        {
            **VECTOR,
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": ("DownBlock2D", ATTENTION_DOWN, ATTENTION_DOWN, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", ATTENTION_UP, ATTENTION_UP, "UpBlock2D"),
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },
        2259.53,
    ),
}


def reduced(layout: Layout) -> tuple[UNetConfig, dict[str, Any]]:
    """The layout with every width cut, in both languages: levels 32 or 64 wide, two heads or heads that are 16 wide."""
    ours = tiny(layout.system, WIDTH).unet
    full = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, **layout.diffusers}
    widths = [WIDTH if width == full["block_out_channels"][0] else 2 * WIDTH for width in full["block_out_channels"]]
    by_width = isinstance(full["attention_head_dim"], list)
    depths = full.get("transformer_layers_per_block", 1)
    towers = len(layout.system.text)
    theirs = full | {
        "block_out_channels": widths,
        "attention_head_dim": [width // 16 for width in widths] if by_width else 2,
        "cross_attention_dim": WIDTH * towers,
        "transformer_layers_per_block": min(depths, 2) if isinstance(depths, int) else [min(d, 2) for d in depths],
    }
    if (sizes := layout.system.sizes_in_vector) > 0:
        theirs["projection_class_embeddings_input_dim"] = WIDTH + 256 * sizes
    return ours, theirs


def converted(unet: UNet, config: dict[str, Any]) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, by diffusers' converter."""
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    return convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": 2, "class_embed_type": None, **config})


def inputs(
    config: UNetConfig, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy latent with all input channels, two timesteps, one of them between two whole ones, and text states."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator)
    text = torch.randn(2, 7, config.context_width or 1, generator=generator)
    return x.to(dtype), torch.tensor([17.0, 801.5]), text.to(dtype)


@pytest.mark.parametrize(("size", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_output_equals_diffusers(name, size, dtype, tolerance, randomize, relative_error):
    layout = LAYOUTS[name]
    config, theirs_config = reduced(layout)
    ours, theirs = randomize(UNet(config)).to(dtype), UNet2DConditionModel(**theirs_config).eval().to(dtype)
    theirs.load_state_dict(converted(ours, theirs_config))
    x, timestep, text = inputs(config, size, dtype)
    vector, told = None, {}
    if config.classes is not None:
        vector = torch.tensor([20, 350])
        told = {"class_labels": vector}
    elif config.vector_width is not None:
        pooled = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
        numbers = torch.tensor([[1024.0, 768, 0, 16, 1024, 768][: layout.system.sizes_in_vector]]).repeat(2, 1)
        features = get_timestep_embedding(numbers.flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        vector = torch.cat([pooled, features.view(2, -1)], dim=1)
        told = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers}}
    extra = x[:, config.out_channels :] if config.in_channels > config.out_channels else None
    output = ours(x[:, : config.out_channels], timestep, Conditioning(cross=text, vector=vector, concat=extra))
    assert relative_error(output, theirs(x, timestep, text, **told).sample) < tolerance


@torch.inference_mode()
def test_control_residuals_go_where_diffusers_adds_them(randomize, relative_error):
    config, theirs_config = reduced(LAYOUTS["sd15"])
    ours, theirs = randomize(UNet(config)), UNet2DConditionModel(**theirs_config).eval()
    theirs.load_state_dict(converted(ours, theirs_config))
    x, timestep, text = inputs(config, (9, 13))
    generator = torch.Generator().manual_seed(3)
    sizes, widths = [(9, 13), (5, 7), (3, 4), (2, 2)], [32, 64, 64, 64]
    shapes = [(32, 9, 13)]
    for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        shapes += [(width, *size)] * 2
        shapes += [(width, *sizes[level + 1])] if level < 3 else []
    *skips, middle = [torch.randn(2, *shape, generator=generator) for shape in [*shapes, (64, 2, 2)]]
    output = ours(x, timestep, Conditioning(cross=text, control=(*skips, middle)))
    residuals = {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}
    assert relative_error(output, theirs(x, timestep, text, **residuals).sample) < TOLERANCE
    assert relative_error(output, ours(x, timestep, Conditioning(cross=text))) > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, 1e-6)])
@pytest.mark.parametrize("classes", [None, 10])
@torch.inference_mode()
def test_network_without_text_equals_diffusers(classes, dtype, tolerance, randomize, relative_error):
    config = UNetConfig(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        channel_mult=(1, 2, 3),
        attention=(0, 1, 1),
        cross_only=(False, False, False),
        context_width=None,
        heads=None,
        head_width=16,
        classes=classes,
    )
    theirs = UNet2DModel(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        num_class_embeds=classes,
    )
    theirs = theirs.eval().to(dtype)
    ours = randomize(UNet(config)).to(dtype)
    tensors = converted(ours, {"num_class_embeds": classes})
    theirs.load_state_dict(with_separate_projections(tensors, head_width=16))
    x, timestep, _ = inputs(config, (16, 24), dtype)
    labels = None if classes is None else torch.tensor([3, 9])
    output = ours(x, timestep, Conditioning(vector=labels))
    assert relative_error(output, theirs(x, timestep, class_labels=labels).sample) < tolerance


def with_separate_projections(tensors: dict[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """LDM keeps q, k and v of one head together, head after head, in one 1-d convolution; diffusers in three layers."""
    result = {}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".attentions.")[2].partition(".")[2]
        prefix = name.removesuffix(leaf)
        if ".attentions." not in name:
            result[name] = tensor
        elif leaf.startswith("qkv."):
            rows = tensor.shape[0] // 3
            for part, letter in enumerate("qkv"):
                of_part = [row for row in range(3 * rows) if row // head_width % 3 == part]
                result[f"{prefix}to_{letter}{leaf.removeprefix('qkv')}"] = tensor[of_part].squeeze(-1)
        else:
            renamed = leaf.replace("norm", "group_norm").replace("proj_out", "to_out.0")
            result[prefix + renamed] = tensor.squeeze(-1) if "proj_out.weight" in leaf else tensor
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_names_shapes_and_total(name):
    layout = LAYOUTS[name]
    with torch.device("meta"):
        ours, theirs = UNet(layout.system.unet), UNet2DConditionModel(**layout.diffusers)
    expected = {tensor: value.shape for tensor, value in theirs.state_dict().items()}
    assert {tensor: value.shape for tensor, value in converted(ours, layout.diffusers).items()} == expected
    assert layout.millions is not None
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(layout.millions, abs=0.006)


def test_gradients_reach_every_parameter(randomize):
    config, _ = reduced(LAYOUTS["sdxl"])
    unet = randomize(UNet(config)).train()
    x, timestep, text = inputs(config, (8, 8))
    assert config.vector_width is not None
    unet(x, timestep, Conditioning(cross=text, vector=torch.ones(2, config.vector_width))).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_part_that_the_network_needs_must_be_given():
    config, _ = reduced(LAYOUTS["sdxl"])
    x, timestep, text = inputs(config, (8, 8))
    with pytest.raises(ValueError, match=r"needs Conditioning\.cross"):
        UNet(config)(x, timestep, Conditioning())
    with pytest.raises(ValueError, match=r"needs Conditioning\.vector"):
        UNet(config)(x, timestep, Conditioning(cross=text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": (1, 1)}, "need 4 values"),
        ({"cross_only": (False,)}, "need 4 values"),
        ({"head_width": 64}, "exactly one of heads and head_width"),
        ({"heads": None}, "exactly one of heads and head_width"),
        ({"classes": 10, "vector_width": 64}, "at most one of vector_width and classes"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(UNetConfig(), **change)

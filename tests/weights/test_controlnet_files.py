"""ControlNets from files: every layout gives the same network, and what is no ControlNet is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.apps.cli import main
from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl, sdxl_refiner, tiny
from ldm.models.unet import UNet
from ldm.types import Conditioning
from ldm.weights.controlnet import check_base, control_config, control_source, made_for, read_control
from ldm.weights.io import TensorInfo
from ldm.weights.rename import controlnet_names
from ldm.weights.source import Source

SYSTEMS = {"sd1": sd1(), "sd2": sd2(), "sdxl": sdxl()}


def state_of(system: SystemConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a ControlNet for this system, in LDM's bare names."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        network = ControlNet(ControlNetConfig(system.unet))
    return {name: torch.randn(t.shape) * 0.1 for name, t in network.state_dict().items()}


def unet_of(system: SystemConfig) -> UNet:
    with torch.device("meta"):
        return UNet(system.unet)


def their_arguments(system: SystemConfig) -> dict[str, Any]:
    unet = system.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    vector = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.attention),
        "transformer_layers_per_block": tuple(depth or unet.middle_attention for depth in unet.attention),
        "attention_head_dim": tuple(unet.heads_for(width) for width in widths),
        "cross_attention_dim": unet.context_width,
        "use_linear_projection": unet.linear_projections,
        "projection_class_embeddings_input_dim": unet.vector_width,
        **(vector if unet.vector_width else {}),
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_converted_there_and_back(name, tmp_path):
    state = state_of(tiny(SYSTEMS[name]))
    save_file({f"control_model.{key}": tensor for key, tensor in state.items()}, tmp_path / "control.safetensors")
    assert main(["convert", str(tmp_path / "control.safetensors"), str(tmp_path / "folder")]) == 0
    theirs = ControlNetModel.from_pretrained(tmp_path / "folder", local_files_only=True)
    names = controlnet_names(ControlNetConfig(tiny(SYSTEMS[name]).unet))
    assert {piece.names[0] for piece in names.values()} == theirs.state_dict().keys()
    assert all(torch.equal(theirs.state_dict()[names[key].names[0]], tensor) for key, tensor in state.items())
    theirs.save_pretrained(tmp_path / "resaved")
    assert main(["convert", str(tmp_path / "resaved"), str(tmp_path / "back.safetensors")]) == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == {f"control_model.{key}" for key in state}
    assert all(torch.equal(back[f"control_model.{key}"], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("layout", ["control_model", "bare", "with a base", "pickle"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_original_names(name, layout, tmp_path):
    system = tiny(SYSTEMS[name])
    state = state_of(system)
    saved = state if layout == "bare" else {f"control_model.{name}": tensor for name, tensor in state.items()}
    if layout == "with a base":
        saved |= {"model.diffusion_model.out.2.weight": torch.ones(3), "betas": torch.ones(5)}
    path = tmp_path / ("control.pth" if layout == "pickle" else "control.safetensors")
    if layout == "pickle":
        torch.save({"state_dict": saved}, path)
    else:
        save_file(saved, path)
    read = read_control(path, unet_of(system), allow_pickle=layout == "pickle")
    assert read.config == ControlNetConfig(system.unet)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    assert not read.training and not any(p.requires_grad for p in read.parameters())


@pytest.mark.parametrize("layout", ["folder", "shards", "file"])
@pytest.mark.parametrize("name", SYSTEMS)
@torch.inference_mode()
def test_what_diffusers_writes(name, layout, tmp_path):
    """Its own network, saved by itself, answers the same when we read it."""
    system = tiny(SYSTEMS[name])
    torch.manual_seed(1)
    theirs = ControlNetModel(**their_arguments(system)).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB" if layout == "shards" else "10GB")
    path = tmp_path
    if layout == "file":
        path = tmp_path / "diffusion_pytorch_model.safetensors"
    ours = read_control(path, unet_of(system))
    x, hint, text = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64), torch.randn(1, 7, system.unet.context_width or 1)
    vector, told = None, {}
    if system.unet.vector_width is not None:
        vector = torch.zeros(1, system.unet.vector_width)
        vector[:, 32:] = torch.cat([torch.ones(128), torch.zeros(128)]).repeat(6)  # sizes of 0
        told = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}}
    timestep = torch.tensor([321.0])
    residuals = ours(x, timestep, Conditioning(cross=text, vector=vector), hint)
    expected, middle = theirs(x, timestep, text, hint, return_dict=False, **told)
    for residual, their_residual in zip(residuals, [*expected, middle], strict=True):
        assert torch.allclose(residual, their_residual, rtol=1e-4, atol=1e-4 * float(their_residual.abs().max()))


def test_the_config_beside_the_file_counts(tmp_path):
    theirs = ControlNetModel(**their_arguments(tiny(sd1())), global_pool_conditions=True)
    theirs.save_pretrained(tmp_path / "pooled")
    assert read_control(tmp_path / "pooled").config.pooled
    theirs.register_to_config(controlnet_conditioning_channel_order="bgr")
    theirs.save_pretrained(tmp_path / "bgr")
    with pytest.raises(LdmError, match="bgr: looks at pictures in BGR order, which is not supported"):
        read_control(tmp_path / "bgr")


def test_a_style_is_known_by_its_name(tmp_path):
    save_file(state_of(tiny(sd1())), tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert read_control(tmp_path / "control_v11e_sd15_shuffle.safetensors").config.pooled


def test_dtype(tmp_path):
    save_file({name: tensor.half() for name, tensor in state_of(tiny(sd1())).items()}, tmp_path / "x.safetensors")
    read = read_control(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}


def test_differences_are_added_to_the_base(tmp_path):
    system = tiny(sd1())
    state, unet = state_of(system), UNet(system.unet)
    saved = {f"control_model.{name}": tensor for name, tensor in state.items()} | {"difference": torch.ones(1)}
    save_file(saved, tmp_path / "x.safetensors")
    read, base = read_control(tmp_path / "x.safetensors", unet).state_dict(), unet.state_dict()
    assert any(name.startswith("zero_convs.") for name in read) and "input_blocks.1.0.in_layers.2.weight" in base
    for name, tensor in read.items():
        assert torch.equal(tensor, state[name] + base[name] if name in base else state[name]), name
    with pytest.raises(LdmError, match="holds differences to a U-Net's weights; give the model that it is for"):
        read_control(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_full_size(name, layout):
    """The published sizes, by names and shapes alone."""
    system = SYSTEMS[name]
    config = ControlNetConfig(system.unet)
    with torch.device("meta"):
        network = ControlNet(config) if layout == "original" else ControlNetModel(**their_arguments(system))
    infos = {name: TensorInfo("F16", tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    source = control_source(Source(Path("x"), infos, {}, lambda names: iter(())))
    assert control_config(source.shapes) == config
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in ControlNet(config).state_dict().items()}
    assert source.shapes == expected
    if layout == "diffusers":
        assert {name for piece in controlnet_names(config).values() for name in piece.names} == set(infos)


MISMATCHES = {
    ("sd1", "sd2"): r"is made for SD 1.x \(text 768 wide\), the model is SD 2.x \(text 1024 wide\)",
    ("sd2", "sd1"): r"is made for SD 2.x \(text 1024 wide\), the model is SD 1.x \(text 768 wide\)",
    ("sdxl", "sd1"): r"is made for SDXL \(text 2048 wide\), the model is SD 1.x \(text 768 wide\)",
    ("sdxl", "refiner"): r"is made for SDXL \(text 2048 wide\), the model is the SDXL refiner \(text 1280 wide\)",
}


@pytest.mark.parametrize(("control", "base"), MISMATCHES)
def test_another_base_is_named(control, base):
    systems = SYSTEMS | {"refiner": sdxl_refiner()}
    with pytest.raises(LdmError, match=MISMATCHES[control, base]):
        check_base(ControlNetConfig(systems[control].unet), systems[base].unet)
    check_base(ControlNetConfig(systems[control].unet), systems[control].unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 64}, "its width is 64, the model's 32"),
        ({"channel_mult": (1, 2, 2)}, r"its widths of levels is \(1, 2, 2\), the model's \(1, 2, 2, 2\)"),
        ({"vector_width": 7}, "its width of the vector is 7, the model's None"),
        ({"in_channels": 16}, "looks at 16 latent channels, the model has 4"),
    ],
)
def test_other_widths_do_not_fit(change, message):
    base = tiny(sd1()).unet
    levels = len(change.get("channel_mult", base.channel_mult))
    cut = {"attention": base.attention[:levels], "cross_only": base.cross_only[:levels]}
    with pytest.raises(LdmError, match=message):
        check_base(ControlNetConfig(replace(base, **cut, **change)), base)


def test_an_inpainting_model_takes_an_ordinary_one():
    check_base(ControlNetConfig(sd1().unet), sd1(in_channels=9).unet)


def test_words_for_a_family():
    assert (
        made_for(sdxl().unet) == "SDXL (text 2048 wide)" and made_for(tiny(sd1()).unet) == "a U-Net with text 32 wide"
    )


REFUSED: dict[str, tuple[list[str], str]] = {
    "control-lora": (["lora_controlnet", "input_blocks.0.0.up"], "is a Control-LoRA, which is not read"),
    "lllite": (["lllite_unet_down.depth1.weight"], "is a ControlNet-LLLite"),
    "union": (["task_embedding", "controlnet_cond_embedding.conv_in.weight"], "is a ControlNet-Union"),
    "adapter": (["body.0.block1.weight"], "is a T2I-Adapter"),
    "flux": (["controlnet_blocks.0.weight"], "is a control network of a transformer model"),
    "other": (["x"], "holds no ControlNet; expected control_model"),
    "cut": (["input_hint_block.0.weight"], "tensor .* is missing"),
    "cut, diffusers": (["controlnet_cond_embedding.conv_in.weight"], "tensor .* is missing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_control_net_is_named(kind, tmp_path):
    names, message = REFUSED[kind]
    save_file({name: torch.ones(2, 2, 1, 1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match=message) as caught:
        read_control(tmp_path / "x.safetensors")
    assert str(caught.value).count("x.safetensors") == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_convs.3.0.weight": None}, "1 missing, as zero_convs.3.0.weight"),
        ({"zero_convs.99.0.weight": torch.ones(3)}, "1 unexpected, as zero_convs.99.0.weight"),
        ({"zero_convs.3.0.weight": torch.ones(3)}, "1 of another shape, as zero_convs.3.0.weight"),
        ({"zero_convs.3.0.bias": torch.ones(64, dtype=torch.int64)}, "1 not of floating-point numbers, as zero_convs"),
    ],
    ids=["missing", "unexpected", "misshapen", "whole numbers"],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    state = state_of(tiny(sd1())) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(LdmError, match=message):
        read_control(tmp_path / "x.safetensors")

"""Whole models whose U-Net keeps its weights in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.apps.cli import main
from ldm.errors import LdmError
from ldm.layers.in_bytes import FEW, Store, full_state, in_bytes, layers_in_bytes, made_of
from ldm.layers.sharing import shared_copy
from ldm.models.offloading import Offload, block_by_block, blocks_of
from ldm.models.presets import sd1, sdxl, tiny
from ldm.pipeline.device import Precision
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, save_checkpoint
from ldm.pipeline.plan import Work, plan_drawing, tensors_of
from ldm.weights.adapters.read import Adapter, read_adapter

FIELDS: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
QUERY = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_input_blocks_1_0_in_layers_2"


@pytest.fixture(scope="module")
def file(tiny_file) -> Path:
    return tiny_file(tiny(sd1(), width=64))


@pytest.fixture(scope="module")
def model(file) -> LatentDiffusion:
    return load(file, device="cpu", store="int8")


@pytest.fixture
def adapter(tmp_path) -> Iterator[Adapter]:
    torch.manual_seed(0)
    tensors = {
        f"{QUERY}.lora_down.weight": torch.randn(2, 64), f"{QUERY}.lora_up.weight": torch.randn(64, 2),
        f"{CONVOLUTION}.lora_down.weight": torch.randn(2, 64, 3, 3),
        f"{CONVOLUTION}.lora_up.weight": torch.randn(64, 2, 1, 1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "cat.safetensors")
    yield read_adapter(tmp_path / "cat.safetensors")


def rounded(model: LatentDiffusion) -> LatentDiffusion:
    """The whole model with the weights that `store="int8"` keeps in bytes rounded as this does."""
    unet = shared_copy(model.unet)
    for block in blocks_of(unet):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1 and weight.numel() >= FEW:
                module.weight = torch.nn.Parameter(made_of(*in_bytes(weight)), requires_grad=False)
    return replace(model, unet=unet)


def pixels(model: LatentDiffusion) -> np.ndarray:
    return np.array(model.generate("a cat", **FIELDS)[0].image)


def test_it_draws_as_the_rounded_weights_do(file, model):
    whole = load(file, device="cpu")
    assert np.array_equal(pixels(model), pixels(rounded(whole)))
    assert (pixels(model) != pixels(whole)).any()
    names = {name for name, _ in layers_in_bytes(model.unet)}
    kept = {f"{name}.weight" for name in names}
    sizes = {name: p.nbytes for name, p in whole.unet.named_parameters()}
    assert sum(sizes[name] for name in kept) > 0.8 * sum(sizes.values())  # nearly all of it
    saved = sum(sizes.values()) - sum(p.nbytes for p in model.unet.parameters())
    assert saved > 0.7 * sum(sizes[name] for name in kept)  # three of four bytes, less the scales
    assert full_state(model.unet).keys() == whole.unet.state_dict().keys()


def test_adapters_change_what_is_kept_and_leave_it_as_it_was(model, adapter):
    changed = model.with_adapters([(adapter, 0.7)])
    reference = rounded_reference(model, adapter, 0.7)
    for name, tensor in full_state(changed.unet).items():
        off = (tensor - reference[name]).abs() > 1e-5  # a sum that lies between two steps may go to either
        assert float(off.float().mean()) < 1e-3, name
    assert (pixels(changed) != pixels(model)).any()
    assert np.array_equal(
        pixels(changed.with_adapters([(adapter, 0.3)]).with_adapters([(adapter, 0.7)])), pixels(changed)
    )
    back = changed.with_adapters(())
    assert not back.originals
    for one, other in zip(back.unet.state_dict().items(), model.unet.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def rounded_reference(model: LatentDiffusion, adapter: Adapter, weight: float) -> dict[str, Tensor]:
    """The U-Net's weights with the adapter added to them and rounded again, by hand."""
    state, tensors = full_state(model.unet), load_file(adapter.path)
    for key, name in (
        (QUERY, "input_blocks.1.1.transformer_blocks.0.attn1.to_q"),
        (CONVOLUTION, "input_blocks.1.0.in_layers.2"),
    ):
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        product = (up.flatten(1) @ down.flatten(1)).reshape(state[f"{name}.weight"].shape)
        state[f"{name}.weight"] = made_of(*in_bytes(state[f"{name}.weight"] + weight * product))
    return state


def test_compiled_blocks_and_such_as_come_one_by_one_draw_the_same(model):
    expected = pixels(model)
    assert np.array_equal(pixels(model.compiled("eager")), expected)
    visiting = replace(model, unet=block_by_block(model.unet, torch.device("cpu")))
    assert np.array_equal(pixels(visiting), expected)


def test_it_is_not_written_as_a_checkpoint(model, tmp_path):
    with pytest.raises(LdmError, match="store int8: this model's weights were rounded to a byte"):
        save_checkpoint(model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("offload", ["none", "parts"])
def test_a_plan_knows_what_it_saves(offload: Offload):
    config = tiny(sdxl(), width=128)
    half = Precision(torch.float16, torch.float16, torch.float16)

    def peaks(store: Store) -> dict[str, int]:
        work = Work(config, tensors_of(config), torch.device("cuda"), half, 64, 64, offload=offload, store=store)
        return {phase.name: phase.peak for phase in plan_drawing(work)}

    full, int8 = peaks("full"), peaks("int8")
    unet = sum(info.count * 2 for name, info in tensors_of(config).items() if name.startswith("model.diffusion_model."))
    saved = full["denoise"] - int8["denoise"]
    assert 0.35 * unet < saved < 0.5 * unet
    assert int8["decode"] < full["decode"] if offload == "none" else int8["decode"] == full["decode"]


def test_a_picture_says_so_and_is_made_again(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["generate", "x", "--model", str(file), "--size", "64", "--steps", "1", "--seed", "1", "--store", "int8"]
    assert main([*flags, "--device", "cpu", "-o", "a.png"]) == 0
    with Image.open("a.png") as picture:
        assert json.loads(picture.text["ldm"])["store"] == "int8"  # pyright: ignore[reportAttributeAccessIssue]
    capsys.readouterr()
    again = ["redo", "a.png", "--model", str(file), "--device", "cpu"]
    assert main([*again, "-o", "b.png"]) in (0, 1)
    assert 'store: is full, but the picture\'s was "int8"; see --store' in "".join(capsys.readouterr())
    assert main([*again, "--store", "int8", "-o", "c.png"]) == 0
    with Image.open("a.png") as one, Image.open("c.png") as other:
        assert one.tobytes() == other.tobytes()

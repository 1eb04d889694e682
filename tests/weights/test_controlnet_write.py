"""A ControlNet that was trained here: its file is read here, and its folder by diffusers, with the same answers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors import safe_open

from ldm.errors import LdmError
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.presets import sd1, sd2, sdxl, small, tiny
from ldm.types import Conditioning
from ldm.weights.controlnet import read_control
from ldm.weights.controlnet_write import write_control

SYSTEMS = {"sd1": sd1(), "sd2": sd2(), "sdxl": sdxl(), "small": small()}


def trained(name: str) -> ControlNet:
    network = ControlNet(ControlNetConfig(tiny(SYSTEMS[name]).unet)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_file_is_read_here(name, tmp_path):
    network, path = trained(name), tmp_path / "edges.safetensors"
    write_control(path, network, tiny(SYSTEMS[name]), metadata={"modelspec.author": "me"})
    read = read_control(path)
    assert read.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in read.state_dict().items())
    with safe_open(path, "pt") as file:
        said = file.metadata()
        assert all(key.startswith("control_model.") for key in file.keys())  # noqa: SIM118
    expected = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base",
                "small": "latent-diffusion"}  # fmt: skip
    assert said["modelspec.architecture"] == f"{expected[name]}/controlnet"
    assert (said["modelspec.title"], said["modelspec.author"]) == ("edges", "me")


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@torch.inference_mode()
def test_a_folder_answers_the_same_in_diffusers(name, tmp_path):
    system, network = tiny(SYSTEMS[name]), trained(name)
    write_control(tmp_path / "edges", network, system, layout="diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "edges", local_files_only=True).eval()
    x, hint, text = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64), torch.randn(1, 7, system.unet.context_width or 1)
    vector, told = None, {}
    if system.unet.vector_width is not None:
        vector = torch.zeros(1, system.unet.vector_width)
        vector[:, 32:] = torch.cat([torch.ones(128), torch.zeros(128)]).repeat(6)  # sizes of 0
        told = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)}}
    timestep = torch.tensor([321.0])
    residuals = network(x, timestep, Conditioning(cross=text, vector=vector), hint)
    expected, middle = theirs(x, timestep, text, hint, return_dict=False, **told)
    for residual, their_residual in zip(residuals, [*expected, middle], strict=True):
        torch.testing.assert_close(residual, their_residual, rtol=1e-4, atol=1e-4 * float(their_residual.abs().max()))


def test_half_precision_and_what_it_cannot_hold(tmp_path):
    network, path = trained("sd1"), tmp_path / "edges.safetensors"
    write_control(path, network, tiny(sd1()), dtype=torch.float16)
    assert read_control(path, dtype=torch.float16).state_dict()["input_hint_block.0.bias"].dtype == torch.float16
    with torch.no_grad():
        network.get_parameter("input_hint_block.0.bias").fill_(1e6)
    before = path.read_bytes()
    with pytest.raises(LdmError, match="is too large for F16"):
        write_control(path, network, tiny(sd1()), dtype=torch.float16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

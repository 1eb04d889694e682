"""Files of eight-bit weights with scales: what loads is what other programs make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import sd1, tiny
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.weights.doctor.describe import describe
from ldm.weights.scaled import scaled_down
from ldm.weights.source import open_source

FP8 = torch.float8_e4m3fn
MARK = "model.diffusion_model."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_checkpoint(random_system(tiny(sd1())), path)
    return load_file(path)


def is_scaled(name: str, tensor: Tensor) -> bool:
    return name.startswith(MARK) and name.endswith(".weight") and tensor.ndim == 2


@pytest.mark.parametrize(
    ("word", "shape", "marks"),
    [
        ("scale_weight", (), {f"{MARK}scaled_fp8": torch.zeros(0, dtype=FP8)}),
        ("scale_weight", (1,), {"scaled_fp8": torch.zeros(2, dtype=FP8), f"{MARK}out.2.scale_input": torch.ones(())}),
        ("weight_scale", (), {f"{MARK}time_embed.0.comfy_quant": torch.zeros(9, dtype=torch.uint8)}),
    ],
)
def test_a_scaled_file_is_what_its_numbers_and_scales_say(
    word: str, shape: tuple[int, ...], marks: dict[str, Tensor], whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """weight = stored * scale: the rule of the programs that write such files."""
    stored, wanted = dict(whole) | marks, dict(whole)
    for name in [name for name, tensor in whole.items() if is_scaled(name, tensor)]:
        scale = whole[name].abs().max() / 448
        stored[name] = (whole[name] / scale).to(FP8)
        stored[name.removesuffix("weight") + word] = scale.reshape(shape)
        wanted[name] = stored[name].float() * scale
    path = tmp_path / "scaled.safetensors"
    save_file(stored, path)
    model = load(path, device="cpu", dtype="float32")
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, wanted[MARK + name]), name
    assert model.origin.warnings == ()
    report = describe(path)
    assert report.problem is None and report.kind == "checkpoint"
    assert "F8_E4M3" in report.parts[0].dtypes


def test_a_scale_for_each_row(tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 8).reshape(
        -1, 1, 1, 1
    )
    path = tmp_path / "rows.safetensors"
    save_file(scaled_down("a.weight", weight), path)
    source = open_source(path)
    assert source.shapes == {"a.weight": (8, 3, 3, 3)} and source.tensors["a.weight"].dtype == "F32"
    ((_, got),) = source.read(["a.weight"])
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    normal = weight.abs() >= largest * 2**-6 / 448
    assert ((got - weight).abs() <= weight.abs() / 16 + 1e-12)[normal].all(), "three bits behind the first one"
    assert ((got - weight).abs() <= largest * 2**-10 / 448 * 1.001)[~normal].all(), "half of the smallest step"


def test_rows_of_zeros_stay_zeros(tmp_path: Path) -> None:
    save_file(scaled_down("a.weight", torch.zeros(2, 4)), tmp_path / "zeros.safetensors")
    ((_, got),) = open_source(tmp_path / "zeros.safetensors").read(["a.weight"])
    assert torch.equal(got, torch.zeros(2, 4))


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "blocks.safetensors"
    save_file({"a.weight": torch.zeros(4, 64).to(FP8), "a.weight_scale": torch.ones(4, 2)}, path)
    with pytest.raises(LdmError, match=r"a\.weight_scale has 8 numbers, expected one, or one for each row"):
        open_source(path)


def test_plain_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2).to(FP8)}, tmp_path / "plain.safetensors")
    source = open_source(tmp_path / "plain.safetensors")
    assert source.tensors["a.weight"].dtype == "F8_E4M3"

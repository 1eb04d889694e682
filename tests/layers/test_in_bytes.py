"""Weights in bytes against the formula in float64, and layers against ordinary ones of the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers.convolution import Convolution
from ldm.layers.in_bytes import FEW, InBytes, full_state, in_bytes, keep_in_bytes, layers_in_bytes, made_of


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 3, 3)])
def test_codes_are_the_nearest_of_255_steps_of_each_row(shape):
    weight = random(*shape)
    codes, scale = in_bytes(weight)
    rows = weight.flatten(1).double().numpy()
    steps = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert np.allclose(scale.flatten(1).numpy(), steps, rtol=1e-6)
    assert np.array_equal(codes.flatten(1).numpy(), np.rint(rows / scale.flatten(1).double().numpy()))
    assert (np.abs(made_of(codes, scale).flatten(1).numpy() - rows) <= steps * 0.500001).all()
    assert codes.abs().amax() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_rounded_is_not_rounded_again(dtype):
    codes, scale = in_bytes(random(32, 64, dtype=dtype))
    assert torch.equal(in_bytes(made_of(codes, scale))[0], codes)
    assert scale.dtype == made_of(codes, scale).dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.0095), (torch.bfloat16, 0.0105), (torch.float16, 0.0095)]
)
def test_a_row_of_normal_weights_is_off_by_a_hundredth(dtype, most):
    weight = random(64, 1280, dtype=dtype) * 0.02
    off = made_of(*in_bytes(weight)).double() - weight.double()
    assert 0.005 < float(off.norm() / weight.double().norm()) < most


def test_rows_of_zeros_stay_and_a_layout_too():
    weight = random(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    weight[3] = 0
    codes, scale = in_bytes(weight)
    made = made_of(codes, scale)
    assert torch.equal(made[3], torch.zeros(4, 3, 3)) and torch.isfinite(made).all()
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_layers_compute_with_what_their_bytes_say():
    block = nn.Sequential(
        nn.Linear(64, 96), nn.Linear(64, 80, bias=False), nn.Linear(8, 8), nn.LayerNorm(FEW),
        Convolution(32, 48, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(64, 64, 1),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    keep_in_bytes([block])
    assert [name for name, _ in layers_in_bytes(block)] == ["0", "1", "4", "5", "6"]  # not what is small, not a norm
    expected = {
        name: made_of(*in_bytes(p)) if name in ("0.weight", "1.weight", "4.weight", "5.weight", "6.weight") else p
        for name, p in before.items()
    }
    assert full_state(block).keys() == expected.keys()
    for name, tensor in full_state(block).items():
        assert torch.equal(tensor, expected[name]), name
    x, picture = random(3, 64), random(1, 64, 9, 7)
    assert torch.equal(block[0](x), F.linear(x, expected["0.weight"], expected["0.bias"]))
    assert torch.equal(block[1](x), F.linear(x, expected["1.weight"]))
    convolved = F.conv2d(picture[:, :32], expected["4.weight"], expected["4.bias"], padding=1)
    assert torch.allclose(block[4](picture[:, :32]), convolved, atol=1e-5)
    convolved = F.conv2d(picture[:, :16], expected["5.weight"], expected["5.bias"], stride=2, padding=1)
    assert torch.allclose(block[5](picture[:, :16]), convolved, atol=1e-5)
    assert torch.allclose(block[6](picture), F.conv2d(picture, expected["6.weight"], expected["6.bias"]), atol=1e-5)
    assert isinstance(block[0], InBytes) and not any(p.requires_grad for p in (block[0].codes, block[0].scale))

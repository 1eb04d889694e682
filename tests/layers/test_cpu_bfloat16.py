"""Attention and convolution by plain products, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.layers import cpu_bfloat16
from ldm.layers.convolution import Convolution
from ldm.layers.cpu_bfloat16 import attend_in_blocks, convolve_by_product


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scores", [1, 20, 7 * 9, 3 * 7 * 9, 2**21])
@pytest.mark.parametrize("width", [16, 40])
def test_blocks_of_any_size_give_the_same(scores, width, monkeypatch):
    monkeypatch.setattr(cpu_bfloat16, "BLOCK_SCORES", scores)
    q, k, v = (torch.randn(2, 4, n, width) for n in (7, 9, 9))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.allclose(attend_in_blocks(q, k, v).double(), exact, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_convolution(last, biased):
    layout = torch.channels_last if last else torch.contiguous_format
    x, weight = (torch.randn(size).contiguous(memory_format=layout) for size in ((2, 6, 5, 7), (8, 6, 3, 3)))
    bias = torch.randn(8) if biased else None
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert torch.allclose(convolve_by_product(x, weight, bias).double(), exact, atol=1e-4)


def test_few_positions_and_many_weights_go_by_the_product_where_nothing_learns(monkeypatch):
    monkeypatch.setattr(cpu_bfloat16, "FEW_POSITIONS", 2 * 4 * 4)
    monkeypatch.setattr(cpu_bfloat16, "MANY_WEIGHTS", 9 * 8 * 16)
    calls = []
    monkeypatch.setattr(cpu_bfloat16, "convolve_by_product", lambda *a: calls.append(1) or convolve_by_product(*a))
    layer = Convolution(8, 16, 3, padding=1)
    x = torch.randn(2, 8, 4, 4)
    exact = layer(x)
    layer.bfloat16()
    with torch.no_grad():
        out = layer(x.bfloat16())
        assert len(calls) == 1
        assert torch.allclose(out.float(), exact, atol=0.03)
        assert out.is_contiguous(memory_format=torch.channels_last)
        layer(torch.randn(2, 8, 4, 5).bfloat16())
        Convolution(8, 15, 3, padding=1).bfloat16()(x.bfloat16())
        Convolution(8, 16, 3, padding=1, stride=2).bfloat16()(x.bfloat16())
        Convolution(8, 99, 1).bfloat16()(x.bfloat16())
    layer(x.bfloat16()).sum().backward()
    assert len(calls) == 1
    assert layer.weight.grad is not None

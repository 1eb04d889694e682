"""Attention and convolution by plain products, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.layers import cpu_products
from ldm.layers.convolution import Convolution, fastest_layout
from ldm.layers.cpu_products import attend_in_blocks, convolve_by_product


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scores", [1, 20, 7 * 9, 3 * 7 * 9, 2**21])
@pytest.mark.parametrize("width", [16, 40])
def test_blocks_of_any_size_give_the_same(scores, width, monkeypatch):
    monkeypatch.setattr(cpu_products, "BLOCK_SCORES", scores)
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


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_few_positions_and_many_weights_go_by_the_product_where_nothing_learns(dtype, close, monkeypatch):
    monkeypatch.setattr(cpu_products, "FEW_POSITIONS", 2 * 4 * 4)
    monkeypatch.setattr(cpu_products, "MANY_WEIGHTS", 9 * 8 * 16)
    calls = []
    monkeypatch.setattr(cpu_products, "convolve_by_product", lambda *a: calls.append(1) or convolve_by_product(*a))
    layer = Convolution(8, 16, 3, padding=1)
    x = torch.randn(2, 8, 4, 4)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.no_grad():
        out = layer(x)
        assert len(calls) == 1
        assert torch.allclose(out.double(), exact, atol=close)
        assert out.is_contiguous(memory_format=torch.channels_last)
        layer(torch.randn(2, 8, 4, 5).to(dtype))
        Convolution(8, 15, 3, padding=1).to(dtype)(x)
        Convolution(8, 16, 3, padding=1, stride=2).to(dtype)(x)
        Convolution(8, 99, 1).to(dtype)(x)
    layer(x).sum().backward()
    assert len(calls) == 1
    assert layer.weight.grad is not None


def test_large_weights_are_laid_out_for_it_in_float32_and_small_ones_are_not(monkeypatch):
    monkeypatch.setattr(cpu_products, "MANY_WEIGHTS", 9 * 8 * 16)
    large, small, pointwise = torch.randn(16, 8, 3, 3), torch.randn(15, 8, 3, 3), torch.randn(64, 64, 1, 2)
    for weight, last in ((large, True), (small, False), (pointwise, False), (large.double(), False)):
        laid = fastest_layout(weight)
        assert torch.equal(laid, weight)
        assert laid.is_contiguous(memory_format=torch.channels_last) is last

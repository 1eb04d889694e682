"""The U-Net's changes of size; its residual block is tested within the whole network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.layers.convolution import Downsample, ResBlock, Upsample, fastest_layout


@pytest.mark.parametrize(("side", "half"), [(8, 4), (9, 5), (1, 1)])
def test_downsample_halves_and_rounds_up(side, half):
    layer, x = Downsample(4), torch.randn(1, 4, side, side)
    assert layer(x).shape == (1, 4, half, half)
    everywhere = F.conv2d(x, layer.op.weight, layer.op.bias, padding=1)
    assert torch.allclose(layer(x), everywhere[..., ::2, ::2], atol=1e-6)


@pytest.mark.parametrize("size", [(8, 10), (7, 9)])
def test_upsample_takes_the_nearest_pixel(size):
    layer, x = Upsample(4), torch.randn(1, 4, 4, 5)
    rows, columns = ([i * small // big for i in range(big)] for small, big in zip((4, 5), size, strict=True))
    nearest = x[:, :, rows][:, :, :, columns]
    assert torch.allclose(layer(x, size), layer.conv(nearest), atol=1e-6)


def test_residual_block_starts_from_its_input():
    torch.manual_seed(0)
    block, x, embedding = ResBlock(32, 32, 16), torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    torch.nn.init.zeros_(block.out_layers[3].weight)
    torch.nn.init.zeros_(block.out_layers[3].bias)
    assert torch.equal(block(x, embedding), x)


def test_residual_block_drops_only_in_training():
    torch.manual_seed(0)
    block, x, embedding = ResBlock(32, 64, 16, dropout=0.5), torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    assert not torch.equal(block(x, embedding), block(x, embedding))
    block.eval()
    assert torch.equal(block(x, embedding), block(x, embedding))


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_half_precision_is_laid_out_channels_last(dtype, last):
    x = torch.randn(2, 4, 5, 6).to(dtype)
    out = fastest_layout(x)
    assert torch.equal(out, x)
    assert out.is_contiguous(memory_format=torch.channels_last) is last
    assert fastest_layout(x[0, 0]).is_contiguous()

"""Counting storages against closed forms, and what kernels of the device that is meant are known to hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.layers.attention import attend
from ldm.layers.cpu_products import BLOCK_SCORES
from ldm.pipeline.live_memory import live_memory

CPU = torch.device("cpu")
FLOAT = 4


def test_what_lives_is_counted_once_and_no_longer_than_it_lives():
    with live_memory(CPU) as memory:
        x = torch.empty(1000)
        assert memory.live == memory.peak == 1000 * FLOAT
        view = x[10:].view(2, -1)
        assert memory.live == 1000 * FLOAT
        del x
        assert memory.live == 1000 * FLOAT  # the view keeps it
        del view
        assert (memory.live, memory.peak) == (0, 1000 * FLOAT)
        memory.restart()
        assert memory.peak == 0


def test_a_chain_holds_what_goes_in_and_what_comes_out():
    with live_memory(CPU) as memory, torch.no_grad():
        x = torch.empty(1000)
        F.relu(F.relu(F.relu(x)))
    assert memory.peak == 3 * 1000 * FLOAT  # x, and what one of them is given and gives


def test_in_training_what_the_way_back_needs_is_kept():
    with live_memory(CPU) as memory:
        x = torch.empty(1000, requires_grad=True)
        x.exp().exp().exp().sum().backward()
        assert x.grad is not None and memory.live == 2 * 1000 * FLOAT
    assert memory.peak >= 5 * 1000 * FLOAT  # x, three results, and a gradient


def test_tensors_say_that_they_lie_on_the_device():
    gpu = torch.device("cuda", 1)
    with live_memory(gpu):
        x = torch.empty(3, device=gpu)
        assert x.device == gpu and x.to(x.device).new_empty(2).device == gpu
    assert x.device.type == "meta"


def test_contiguous_pictures_and_weights_are_copied_into_the_layout_of_onednn():
    with live_memory(CPU) as memory, torch.no_grad():
        x, weight = torch.empty(1, 16, 32, 32), torch.empty(16, 16, 3, 3)
        F.conv2d(x, weight, padding=1)
    assert memory.peak == (3 * x.numel() + 2 * weight.numel()) * FLOAT  # the blocked x besides, or the blocked result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_cpu_never_holds_a_whole_map(dtype):
    """2^26 scores; in float32 the fused kernel's, in bfloat16 our own blocks of them, twice."""
    with live_memory(CPU) as memory, torch.no_grad():
        q = torch.empty(1, 8192, 64, dtype=dtype)
        attend(q, q, q, heads=1)
    tensors = 6 * q.numel() * dtype.itemsize
    blocks = 2 * BLOCK_SCORES * dtype.itemsize if dtype is torch.bfloat16 else 0
    assert blocks < memory.peak <= tensors + blocks


@pytest.mark.parametrize(("dtype", "holds"), [(torch.bfloat16, True), (torch.float32, False)])
def test_in_training_attention_holds_its_map_in_bfloat16(dtype, holds):
    with live_memory(CPU) as memory:
        q = torch.empty(1, 1024, 64, dtype=dtype, requires_grad=True)
        attend(q, q, q, heads=1).sum().backward()
    assert (memory.peak >= 2 * 1024 * 1024 * dtype.itemsize) is holds

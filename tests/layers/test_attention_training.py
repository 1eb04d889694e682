"""Which of torch's kernels attention learns by, seen in what is recorded for the backward pass."""

from __future__ import annotations

import pytest
import torch

from ldm.layers.attention import attend


def recorded(out: torch.Tensor) -> set[str]:
    """The names of all functions behind a result."""
    names, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            left += [function for function, _ in node.next_functions]
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_learns_in_float32_and_products_in_bfloat16(dtype):
    q, k, v = (torch.randn(2, 16, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    fused = any("FlashAttention" in name for name in recorded(attend(q, k, v, 4)))
    assert fused == (dtype is torch.float32)


def test_both_give_the_same_gradients():
    x = torch.randn(2, 16, 32)
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.roll(i, 1).to(dtype).requires_grad_(True) for i in range(3))
        attend(q, k, v, 4).square().sum().backward()
        gradients[dtype] = torch.stack([t.grad.float() for t in (q, k, v)])
    error = (gradients[torch.bfloat16] - gradients[torch.float32]).norm() / gradients[torch.float32].norm()
    assert error < 0.02

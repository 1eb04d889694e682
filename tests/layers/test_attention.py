"""Attention against the textbook formula in float64, on every back end."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import types

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.layers import cpu_products
from ldm.layers.attention import AttentionBlock, CrossAttention, attend, attention_backend
from ldm.layers.cpu_products import attend_in_blocks


def textbook(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Head by head and query by query, with nothing fused."""
    width = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        qh, kh, vh = (t[..., head * width : (head + 1) * width].double() for t in (q, k, v))
        rows = []
        for n in range(q.shape[1]):
            seen = n + 1 if causal else k.shape[1]
            scores = (kh[:, :seen] * qh[:, n : n + 1]).sum(-1) / width**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            rows.append((weights[..., None] * vh[:, :seen]).sum(1))
        parts.append(torch.stack(rows, dim=1))
    return torch.cat(parts, dim=-1)


def random_qkv(queries: int, keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, width, generator=generator) for n in (queries, keys, keys))


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("keys", [5, 9])
def test_attend_is_softmax_attention(heads, keys):
    q, k, v = random_qkv(5, keys, 16)
    assert torch.allclose(attend(q, k, v, heads).double(), textbook(q, k, v, heads), atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_causal_attention_sees_no_later_key(heads):
    q, k, v = random_qkv(7, 7, 16)
    assert torch.allclose(attend(q, k, v, heads, causal=True).double(), textbook(q, k, v, heads, True), atol=1e-5)


def test_attend_takes_slices_of_one_projection():
    q, k, v = random_qkv(6, 6, 48)[0].chunk(3, dim=-1)
    assert torch.allclose(attend(q, k, v, 2).double(), textbook(q, k, v, 2), atol=1e-5)


def test_bfloat16_on_a_cpu_goes_in_blocks_where_nothing_learns(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_products, "attend_in_blocks", lambda *args: calls.append(1) or attend_in_blocks(*args))
    q, k, v = (t.bfloat16() for t in random_qkv(6, 9, 16))
    out = attend(q, k, v, 2)
    assert len(calls) == 1
    assert torch.allclose(out.double(), textbook(q, k, v, 2), atol=0.02)
    attend(q.float(), k.float(), v.float(), 2)
    with attention_backend("sdpa"):
        attend(q, k, v, 2)
    q.requires_grad_()
    attend(q, k, v, 2).sum().backward()
    assert len(calls) == 1
    assert q.grad is not None


class LowerTriangularMask:
    """Stands for xformers' class of that name."""


class FakeXformers(types.ModuleType):
    """xformers' interface as its documentation gives it, (B, N, H, K) tensors, with textbook maths."""

    def __init__(self) -> None:
        super().__init__("xformers")
        self.__spec__ = importlib.machinery.ModuleSpec("xformers", loader=None)
        self.calls = 0
        self.ops = types.SimpleNamespace(
            LowerTriangularMask=LowerTriangularMask, memory_efficient_attention=self.memory_efficient_attention
        )

    def memory_efficient_attention(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: object = None) -> Tensor:
        self.calls += 1
        assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
        heads = query.shape[2]
        flat = textbook(*(t.flatten(2) for t in (query, key, value)), heads, causal=attn_bias is not None)
        return flat.float().unflatten(-1, (heads, -1))


@pytest.fixture
def xformers(monkeypatch) -> FakeXformers:
    fake = FakeXformers()
    monkeypatch.setitem(sys.modules, "xformers", fake)
    return fake


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_back_end_gives_the_same(causal, xformers):
    q, k, v = random_qkv(6, 6, 16)
    expected = attend(q, k, v, 2, causal)
    with attention_backend("xformers"):
        assert torch.allclose(attend(q, k, v, 2, causal), expected, atol=1e-5)
    assert xformers.calls == 1


def test_back_end_ends_with_its_block_and_belongs_to_its_thread(xformers):
    q, k, v = random_qkv(3, 3, 8)
    with pytest.raises(RuntimeError, match="inside"), attention_backend("xformers"):
        other = threading.Thread(target=attend, args=(q, k, v, 1))
        other.start()
        other.join()
        assert xformers.calls == 0
        raise RuntimeError("inside")
    attend(q, k, v, 1)
    assert xformers.calls == 0


def test_xformers_that_is_not_installed_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("ldm.layers.attention.find_spec", lambda name: None)
    with pytest.raises(LdmError, match="pip install xformers"), attention_backend("xformers"):
        pass


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None or not torch.cuda.is_available(),
    reason="xformers needs a CUDA device, and to be installed",
)
@pytest.mark.parametrize("causal", [False, True])
def test_real_xformers_gives_the_same(causal):
    q, k, v = (t.cuda().half() for t in random_qkv(64, 64, 128))
    with attention_backend("xformers"):
        found = attend(q, k, v, 2, causal)
    assert torch.allclose(found.cpu().double(), textbook(q.cpu(), k.cpu(), v.cpu(), 2, causal), atol=5e-3)


def test_cross_attention_looks_at_its_context_or_at_itself():
    torch.manual_seed(0)
    layer, x, context = CrossAttention(16, 24, heads=2), torch.randn(2, 5, 16), torch.randn(2, 3, 24)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    assert torch.allclose(layer(x, context).double(), layer.to_out(textbook(q, k, v, 2).float()).double(), atol=1e-5)
    alone = CrossAttention(16, None, heads=2)
    assert torch.equal(alone(x), alone(x, x))
    assert list(alone.state_dict()) == ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]


def test_attention_block_does_not_know_where_a_pixel_is():
    """Without positions, attention over pixels commutes with moving them about."""
    torch.manual_seed(0)
    block, x, order = AttentionBlock(64, heads=4), torch.randn(1, 64, 3, 4), torch.randperm(12)
    moved = x.flatten(2)[..., order].view_as(x)
    assert torch.allclose(block(moved), block(x).flatten(2)[..., order].view_as(x), atol=1e-5)
    assert not torch.allclose(block(x), x, atol=1e-2)

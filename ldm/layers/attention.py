"""Attention, and the one switch between its back ends.

Shapes: B batch, N queries, M keys, D width, H heads, K head width.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import LdmError
from ldm.layers import cpu_products
from ldm.types import Context

if TYPE_CHECKING:
    from collections.abc import Iterator

Backend = Literal["auto", "sdpa", "xformers"]
_backend: ContextVar[Backend] = ContextVar("attention_backend", default="auto")


@contextmanager
def attention_backend(name: Backend) -> Iterator[None]:
    """Use another attention kernel inside the block (this thread or task only).

    auto: torch's fused kernel (sdpa), but for bfloat16 on a CPU, where blocks of plain products are faster.

    Raises LdmError where xformers is asked for and not installed.
    """
    if name == "xformers" and find_spec("xformers") is None:
        raise LdmError("attention: xformers is not installed; pip install xformers, or leave the built-in kernel on")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over `heads` heads. q (B, N, D), k and v (B, M, D) -> (B, N, D).

    Vaswani et al. 2017, section 3.2. `causal`: a query sees no later key (then M = N). `seen` (B, M) bool: the keys
    that are seen at all, among them one that every query may see; xformers is not asked then.
    """
    b, n, d = q.shape
    q, k, v = (t.view(b, t.shape[1], heads, d // heads) for t in (q, k, v))
    if _backend.get() == "xformers" and seen is None:
        from xformers import ops  # pyright: ignore[reportMissingImports]

        out = ops.memory_efficient_attention(q, k, v, attn_bias=ops.LowerTriangularMask() if causal else None)
        return out.reshape(b, n, d)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if seen is None else seen[:, None, None, :]
    if mask is not None and causal:
        mask, causal = mask & mask.new_ones(n, n).tril(), False
    if _backend.get() == "auto" and mask is None and not causal and cpu_products.attention_wins(q, k, v):
        compiles = torch.compiler.is_compiling()
        out = (torch.ops.ldm.attend_in_blocks if compiles else cpu_products.attend_in_blocks)(q, k, v)
    elif q.requires_grad and q.device.type == "cpu" and q.dtype is torch.bfloat16:
        # The fused kernel's backward pass is two to five times slower there; in float32 it is twice as fast.
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).reshape(b, n, d)


def perturb(out: Tensor, values: Tensor, rows: Tensor | None) -> Tensor:
    """What self-attention gives, (B, N, D), where in these rows, (B,) bool, each position has looked at itself alone.

    The attention map is then the identity: perturbed-attention guidance (Ahn et al. 2024, eq. 14).
    """
    return out if rows is None else torch.where(rows[:, None, None], values, out)


class CrossAttention(nn.Module):
    """Multi-head attention from `width` channels to a context; to itself where none is given.

    Rombach et al. 2022, section 3.3. Tensor names: to_q, to_k, to_v, to_out.0.
    """

    def __init__(self, width: int, context_width: int | None, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | Context | None = None, perturbed: Tensor | None = None) -> Tensor:
        """x (B, N, D), context (B, M, context_width), perturbed (B,) bool, see `perturb` -> (B, N, D)."""
        if isinstance(context, Context):
            keys, values = context.made_by(self, self._keys_and_values)
        else:
            keys, values = self._keys_and_values(x if context is None else context)
        out = attend(self.to_q(x), keys, values, self.heads)
        return self.to_out(perturb(out, values, perturbed))

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(context), self.to_v(context)


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map, as in DDPM-like U-Nets without text.

    Ho et al. 2020, section 4; Dhariwal & Nichol 2021, section 3 (heads). Tensor names: norm, qkv, proj_out, of which
    qkv holds q, k and v of the first head, then of the second ..., as in LDM's models without text.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), perturbed (B,) bool, see `perturb` -> the shape of x."""
        b, c, h, w = x.shape
        flat = x.reshape(b, c, h * w)
        qkv = self.qkv(self.norm(flat)).view(b, self.heads, 3, c // self.heads, h * w)
        q, k, v = (t.reshape(b, c, h * w).transpose(1, 2) for t in qkv.unbind(dim=2))
        out = perturb(attend(q, k, v, self.heads), v, perturbed).transpose(1, 2)
        return (flat + self.proj_out(out)).view(b, c, h, w)

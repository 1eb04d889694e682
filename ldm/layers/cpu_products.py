"""What plain matrix products do faster than torch's own kernels on a CPU: attention in bfloat16, small convolutions.

Measured on two cores of server CPUs, one with instructions for bfloat16 and one without, against torch 2's fused
attention and oneDNN's convolutions.
Shapes: B batch, H heads, N queries, M keys, K width of a head, C channels, h and w height and width.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 2**21
"""How many scores of an attention map `attend_in_blocks` holds at once: 4 MiB, which stay in the cache."""

FEW_POSITIONS = 512
MANY_WEIGHTS = 2**23
"""From how few positions, B h w, and how many weights on a convolution is faster as one matrix product."""

DTYPES = (torch.bfloat16, torch.float32)


def attention_wins(*tensors: Tensor) -> bool:
    """Whether `attend_in_blocks` is the faster: in bfloat16. In float32 it is not."""
    return _serves(tensors) and tensors[0].dtype is torch.bfloat16


def _serves(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these are on a CPU, and nothing here learns: what follows is made for that alone."""
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    dtype = tensors[0].dtype
    return not learns and all(t.device.type == "cpu" and t.dtype is dtype for t in tensors) and dtype in DTYPES


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by ordinary matrix products over blocks of heads and queries. q (B, H, N, K), k, v (B, H, M, K) -> q's.

    Two to three times as fast as the fused kernel, which multiplies small tiles. A block's map is whole in its rows, so
    that the softmax is the plain one.
    """
    b, h, n, width = q.shape
    m = k.shape[2]
    q, k, v = ((t * width**-0.5 if t is q else t).reshape(b * h, -1, width) for t in (q, k, v))
    keys, out = k.transpose(1, 2), torch.empty_like(q)
    rows = min(n, max(1, BLOCK_SCORES // m))
    together = min(b * h, max(1, BLOCK_SCORES // (rows * m)))
    # Kept over the blocks: fresh memory of this size is mapped and cleared by the system each time.
    scores, weights = q.new_empty(2, together, rows, m)
    for heads in range(0, b * h, together):
        for queries in range(0, n, rows):
            block = (slice(heads, heads + together), slice(queries, queries + rows))
            size = out[block].shape[:2]
            some, softmax = (t[: size[0], : size[1]] for t in (scores, weights))
            torch.bmm(q[block], keys[block[0]], out=some)
            torch.softmax(some, dim=-1, out=softmax)
            torch.bmm(softmax, v[block[0]], out=out[block])
    return out.view(b, h, n, width)


@cache
def register_operators() -> None:
    """Make `attend_in_blocks` known as torch.ops.ldm.attend_in_blocks, which a compiler takes for one operation.

    Its loops are not unrolled then. Not at import, for it brings much else.
    """
    operator = torch.library.custom_op("ldm::attend_in_blocks", attend_in_blocks, mutates_args=())

    @operator.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q.reshape(-1, *q.shape[2:])).view(q.shape)  # laid out as the real one is


def product_wins(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve_by_product` is the faster: oneDNN brings the weights into its own order at every call, which
    takes longer than a small picture's convolution (2560 to 1280 channels over 2 x 8 x 8, bfloat16: 31 ms against 11;
    float32, over 2 x 4 x 4, on one core: 60 GFLOP/s against 17)."""
    if not may_be_product(weight):  # asked first: the size, once looked at, is a reason to compile a block anew
        return False
    return x.shape[0] * x.shape[2] * x.shape[3] <= FEW_POSITIONS and _serves((x, weight))


def may_be_product(weight: Tensor) -> bool:
    """Whether a convolution's weight is large enough for that; then it should be channels last, or is copied."""
    return weight.numel() >= MANY_WEIGHTS and weight.shape[2:] == (3, 3)


def convolve_by_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution, stride 1, padding 1, as one matrix product over every position's nine neighbours.

    x (B, C, h, w), weight (D, C, 3, 3) -> (B, D, h, w), channels last; a weight that is channels last is not copied.
    """
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, column, channel = padded.stride()
    patches = padded.as_strided((b, h, w, 3, 3, c), (image, row, column, row, column, channel)).reshape(b, h, w, 9 * c)
    return F.linear(patches, weight.permute(0, 2, 3, 1).reshape(-1, 9 * c), bias).permute(0, 3, 1, 2)

"""What `torch.autocast` does to tensors on `meta`, on which it does nothing: for plans of memory.

Micikevicius et al. 2018; which functions run in a half and which in float32 is PyTorch's choice, see "Autocast Op
Reference" in its documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

IN_HALF = {
    F.linear, F.conv1d, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm,
}  # fmt: skip
"""Functions that are run in a half: of those there are, the ones that networks of ours call."""

IN_FLOAT = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}
"""Functions that a GPU runs in float32; a CPU runs them in what they are given."""


class _Lowered(TorchFunctionMode):
    """Casts what such functions are given. The casts of trained weights are kept, as autocast keeps them."""

    def __init__(self, dtype: torch.dtype, gpu: bool, keep: bool) -> None:
        super().__init__()
        self._dtype, self._gpu, self._keep = dtype, gpu, keep
        self._kept = dict[int, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_HALF:
            args, kwargs = tuple(map(self._half, args)), {name: self._half(value) for name, value in kwargs.items()}
        elif self._gpu and func in IN_FLOAT:
            args, kwargs = tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is self._dtype:
            return value
        if not (self._keep and isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._kept:
            self._kept[id(value)] = value.to(self._dtype)
        return self._kept[id(value)]


@contextmanager
def lowered(device: torch.device, dtype: torch.dtype, keep: bool = True) -> Iterator[None]:
    """Inside, functions run as on this device under autocast to `dtype`; float32 is none.

    keep: whether the casts of trained weights are kept until the end; they are forward, and not on the way back
    """
    with nullcontext() if dtype is torch.float32 else _Lowered(dtype, device.type != "cpu", keep):
        yield


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

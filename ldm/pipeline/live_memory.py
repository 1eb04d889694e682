"""How much memory a run would hold, counted while it runs on tensors without numbers.

Inside of `live_memory` networks on torch's `meta` device run as they are, but nothing is computed or allocated; every
tensor says that it lies on the device that is meant, so that each branch taken is the one taken there. Counted are the
storages that are alive, and what a kernel holds besides while it runs. Gradients and optimizers run as networks do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Scratch = Callable[[str, tuple[Any, ...], Any], int]
"""(a kernel's name, what it is given, what it gives back) -> the bytes that it holds besides while it runs."""

Made = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""The shape, strides and dtype of a tensor that a kernel makes."""

META = torch.device("meta")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, until nothing refers to them any more.

    live: bytes now; peak: the most since `restart`
    """

    def __init__(self, scratch: Scratch) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._scratch = scratch
        self._answers = dict[Hashable, list[Made]]()
        self._seen = dict[int, weakref.ref[torch.UntypedStorage]]()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that was made elsewhere, as if it were made here."""
        self._count(tensor)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # what a tensor without numbers says that its number is
        if func.is_view:
            return func(*args, **(kwargs or {}))
        out = self._run(func, args, kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live + self._scratch(func._schema.name, args, out))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a kernel gives back. PyTorch works shapes out slowly: what it found is kept for the next time."""
        if func._schema.is_mutable or (key := _key((func, args, tuple(kwargs.items())))) is None:
            return func(*args, **kwargs)
        if (made := self._answers.get(key)) is not None:
            new = [torch.ops.aten.empty_strided.default(*sizes, dtype=dtype, device=META) for *sizes, dtype in made]
            return new[0] if len(new) == 1 else tuple(new)
        out = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        each: tuple[Any, ...] = out if isinstance(out, tuple) and len(out) > 1 else (out,)
        if all(type(one) is Tensor and one.is_meta and one.untyped_storage()._cdata not in given for one in each):
            self._answers[key] = [(tuple(one.shape), one.stride(), one.dtype) for one in each]
        return out

    def _count(self, tensor: Any) -> None:
        """Add a storage that has not been seen, and take it off again when it goes."""
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's, made of others
            for name in tensor.__tensor_flatten__()[0]:
                self._count(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen or not size:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size


def _key(value: Any) -> Hashable:
    """What decides how a kernel's answer to these arguments looks; None where that is not known."""
    if isinstance(value, tuple | list):
        parts = tuple(map(_key, value))
        return None if None in parts else (type(value), parts)
    if not isinstance(value, Tensor):
        return (type(value), value) if isinstance(value, Hashable) else None
    if type(value) not in (Tensor, nn.Parameter) or not value.is_meta:
        return None
    return tuple(value.shape), value.stride(), value.dtype


class _StandIn(TorchFunctionMode):
    """Inside, tensors on `meta` say that they lie on a device, and what is made there is made on `meta`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func == DEVICE:
            return self._device
        if func is Tensor.cpu:  # nothing is copied where it is there already
            return args[0]
        args, kwargs = tuple(map(_on_meta, args)), {name: _on_meta(value) for name, value in (kwargs or {}).items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


DEVICE = vars(torch._C.TensorBase)["device"].__get__


def _on_meta(value: Any) -> Any:
    return META if isinstance(value, torch.device) else value


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """By the kernel that the device has, which `meta` would not choose: one that never holds a whole map of scores (its
    shapes are those of the CPU's), or plain products where only these are allowed."""
    if torch.backends.cuda.flash_sdp_enabled():
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, 0.0, is_causal)[0]


@contextmanager
def live_memory(device: torch.device, memory: LiveMemory | None = None) -> Iterator[LiveMemory]:
    """Inside, what is run is counted as this device would hold it. memory: what was counted before, to go on with."""
    scratch = cpu_scratch if device.type == "cpu" else no_scratch
    # Masks without numbers choose everything.
    all_chosen = _config.patch(meta_nonzero_assume_all_nonzero=True)  # pyright: ignore[reportAttributeAccessIssue]
    with all_chosen, META, _StandIn(device), memory or LiveMemory(scratch) as memory:
        yield memory


def backward(loss: Tensor) -> None:
    """As `loss.backward()`, but what is worked out again on the way is on its device too.

    PyTorch's own function leaves the modes for as long as it runs; its engine does not.
    """
    ones = (torch.ones_like(loss),)
    _engine_run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def no_scratch(name: str, given: tuple[Any, ...], back: Any) -> int:
    """Of kernels that hold nothing besides."""
    return 0


def cpu_scratch(name: str, given: tuple[Any, ...], back: Any) -> int:
    """What oneDNN holds besides on a CPU.

    It convolves in blocked layouts of its own. Pictures that are channels-last it takes as they are, weights it copies
    at each call; of contiguous ones it first makes a blocked copy, and turns the blocked result back at the end.
    """
    if name != "aten::convolution":
        return 0
    x, weight = given[:2]
    if x.dtype is torch.bfloat16:
        return _bytes(weight)
    return max(_bytes(x) + _bytes(weight), _bytes(back))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""Networks whose repeated blocks are compiled by `torch.compile`.

Blocks and not the whole: those of one kind share what was compiled, so that a U-Net takes as long as its dozen kinds of
blocks, and its weights, which may be exchanged, are no part of it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.layers import cpu_products
from ldm.layers.attention import AttentionBlock
from ldm.layers.convolution import ResBlock
from ldm.layers.sharing import Network, shared_copy
from ldm.layers.transformer import TransformerBlock

REPEATED = (ResBlock, TransformerBlock, AttentionBlock)
"""The blocks that nearly all of a denoising network's time is spent in."""

Backend = str | Callable[..., Any]
"""What `torch.compile` calls one: "inductor", or a function of a graph and example inputs."""


def check_compiler(device: torch.device) -> None:
    """Raise LdmError where `torch.compile` has nothing to compile with for a device."""
    if device.type not in ("cpu", "cuda"):
        raise LdmError(f"compile: found the device {device}, expected a CPU or a CUDA GPU; run without it")
    if device.type == "cuda" and find_spec("triton") is None:
        raise LdmError("compile: triton, which compiles for GPUs, is not installed; pip install triton, or run without")
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    program = next(iter(shlex.split(os.environ.get("CXX", ""))), default)
    if shutil.which(program) is None:
        raise LdmError(
            f"compile: the C++ compiler {program} was not found; install it, name another by the environment variable"
            " CXX, or run without compiling"
        )


class BlockCompiler:
    """Compiles networks, which share what is compiled for blocks of one kind: of one class and with equal shapes.

    Nothing is compiled before a block's first call. At a second size it is compiled once more, for sizes that vary.
    """

    def __init__(self, backend: Backend = "inductor") -> None:
        self._backend: Backend = backend
        self._classes: dict[tuple[object, ...], type[nn.Module]] = {}

    def compiled(self, network: Network) -> Network:
        """A copy of a network that shares every tensor with it and has its blocks compiled; copies of it have, too."""
        cpu_products.register_operators()
        network = shared_copy(network)
        for block in network.modules():
            if type(block) in REPEATED:
                block.__class__ = self._class_for(block)
        return network

    def _class_for(self, block: nn.Module) -> type[nn.Module]:
        """The block's class with a compiled `forward`: of the class, for copies of a block keep theirs."""
        plain = type(block)
        shapes = ((name, *tensor.shape, tensor.dtype) for name, tensor in block.named_parameters())
        kind = (plain, *shapes)
        if kind not in self._classes:
            forward = _compiled(plain.forward, f"{plain.__name__}_{len(self._classes)}", self._backend)
            self._classes[kind] = type(plain.__name__, (plain,), {"forward": forward, "__module__": plain.__module__})
        return self._classes[kind]


def _compiled(forward: Callable[..., Any], name: str, backend: Backend) -> Callable[..., Any]:
    """A method, compiled apart from all others that have the same code.

    PyTorch keeps what it compiled with the code object, at most eight variants of each, and learns by its name which
    sizes vary. So it is given one of its own, and the widths of other blocks do not look like sizes that vary.
    """
    assert isinstance(forward, FunctionType)
    code = forward.__code__.replace(co_name=name)
    own = FunctionType(code, forward.__globals__, name, forward.__defaults__, forward.__closure__)
    run: Callable[..., Any] = torch.compile(own, backend=backend)

    def told_in_one_line(self: nn.Module, *arguments: Any) -> Any:
        try:
            return run(self, *arguments)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise LdmError(f"compile: this machine's compiler failed ({said}); run without it") from error

    return told_in_one_line

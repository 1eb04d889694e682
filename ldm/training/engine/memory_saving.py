"""Less memory for more time: activations inside a network's blocks are worked out again instead of kept.

Chen et al. 2016, "Training deep nets with sublinear memory cost".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.layers.attention import AttentionBlock
from ldm.layers.convolution import ResBlock
from ldm.layers.transformer import TransformerBlock
from ldm.models.text_encoder import CLIPBlock, OpenCLIPBlock

BLOCKS = (ResBlock, AttentionBlock, TransformerBlock, OpenCLIPBlock, CLIPBlock)


@contextmanager
def checkpointed(network: nn.Module, compare: bool = True) -> Iterator[None]:
    """Within, of every block of these kinds only what it was given is kept until its gradients are asked for.

    Gradients are the same, random numbers (dropout's) included. The network is as it was when this ends.
    compare: whether PyTorch compares the second activations with the first, by shape and device
    """
    blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        vars(block)["forward"] = _twice(block.forward, compare)  # of this one block; its class keeps its own
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def _twice(forward: Callable[..., Any], compare: bool) -> Callable[..., Any]:
    check = "default" if compare else "none"

    def again(*told: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*told)
        return checkpoint(forward, *told, use_reentrant=False, determinism_check=check)

    return again

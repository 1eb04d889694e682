"""What the tests of networks share: weights that exercise every tensor, and a measure of how far outputs differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def _randomize(module: Module, seed: int = 0) -> Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.2 * noise + name.endswith("weight"))
    return module.eval()


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def randomize() -> Callable[[Module, int], Module]:
    """Fill a network with random weights, norms and biases too, that keep activations about 1; evaluation mode."""
    return _randomize


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """The largest difference over the largest value, of tensors that must have the same shape."""
    return _relative_error

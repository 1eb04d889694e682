"""Muon: steps that turn every singular direction of a weight matrix alike.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025 (arXiv 2502.16982),
eq. 4, for the size of a step. What is no matrix, or is a thin one (biases, gains, the first and the last convolution),
and a table of embeddings take the steps of Adam (Kingma & Ba 2015) with the same rate and decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ldm.pipeline.device import multiplies_bfloat16

SMALLEST_SIDE = 64
"""A weight with fewer rows or columns is left to Adam."""
TALLEST = 16
"""So is one with more rows for each column: a table of embeddings, whose rows move one by one."""
MOMENTUM = 0.95
STEP_SIZE = 0.2
"""The root mean square of a step at rate 1, about Adam's own, so that one rate serves both."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of p(s) = a s + b s^3 + c s^5, which brings a singular value in (0, 1] near 1 when applied five times."""


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` takes matrices alone; this one takes a whole network, its convolutions as matrices too.

    A convolution (out, in, k, k) is the matrix (out, in k k) that it multiplies its patches by. Matrices of one shape
    are worked out together.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        """betas: Adam's, for what is no matrix."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step along the gradients. `closure` is of the interface, and must be None."""
        assert closure is None
        for group in self.param_groups:
            moving = [weight for weight in group["params"] if weight.grad is not None]
            for weight in moving:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            alike: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for weight in moving:
                if is_matrix(weight):
                    alike[_shape(weight)].append(weight)
                else:
                    self._adam(weight, group["lr"], group["betas"])
            for shape, weights in alike.items():
                self._muon(weights, shape, group["lr"])

    def _muon(self, weights: list[Tensor], shape: tuple[int, int], rate: float) -> None:
        directions = []
        for weight in weights:
            assert weight.grad is not None
            gradient, state = weight.grad.reshape(shape), self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            directions.append(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        steps = orthogonal(torch.stack(directions)).float() * (STEP_SIZE * max(shape) ** 0.5)
        for weight, step in zip(weights, steps, strict=True):
            weight.sub_(step.reshape(weight.shape), alpha=rate)

    def _adam(self, weight: Tensor, rate: float, betas: tuple[float, float]) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["first"], state["second"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        steps, (first, second) = float(state["step"]), betas
        mean = state["first"].lerp_(weight.grad, 1 - first) / (1 - first**steps)
        square = state["second"].lerp_(weight.grad.square(), 1 - second) / (1 - second**steps)
        weight.addcdiv_(mean, square.sqrt_().add_(1e-8), value=-rate)


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon steps it, and not Adam."""
    rows, columns = _shape(weight)
    return weight.ndim >= 2 and min(rows, columns) >= SMALLEST_SIDE and rows <= TALLEST * columns


@torch.no_grad()
def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(K, m, n) -> about U V^T of each, where U S V^T is its singular value decomposition.

    bfloat16, which is exact enough, or float32 where the device is slow in it.

    By a Newton-Schulz iteration: singular values end between 0.7 and 1.2, which serves as well as 1.
    """
    a, b, c = QUINTIC
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if multiplies_bfloat16(x.device) else x.float()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.numel() // weight.shape[0]) if weight.ndim else (1, 1)

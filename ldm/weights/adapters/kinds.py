"""What an adapter does to one weight: each kind is a record of its tensors and the change it makes.

LoRA (Hu et al. 2021), LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2023), (IA)^3 (Liu et al. 2022) and DoRA (Liu et
al. 2024), as peft and LyCORIS write them.
Shapes: the weight is (O, I) or (O, I, k, k), and every kind but the last two changes it as the matrix (O, I k k), so
linear layers and 1x1 convolutions stand for each other. R is the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """up @ down: up (O, R), down (R, I) or (R, I, k, k); with a core (R, R, k, k) between them, down is (R, I)."""

    up: Tensor
    down: Tensor
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.up.shape[0], self.down[0].numel() * (1 if self.core is None else math.prod(self.core.shape[2:]))

    def matrix(self, weight: Tensor) -> Tensor:
        """The product in float32, on the weight's device."""
        up, down = _like(self.up, weight), _like(self.down, weight).flatten(1)
        if self.core is None:
            return up @ down
        return torch.einsum("rs...,or,si->oi...", _like(self.core, weight), up, down).flatten(1)


@dataclass(frozen=True, eq=False)
class Lora:
    """W + scale * up @ down."""

    product: Product
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the weight it is for."""
        return self.product.size

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        return (self.scale * self.product.matrix(weight)).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Loha:
    """W + scale * first * second, elementwise."""

    first: Product
    second: Product
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the weight it is for."""
        return self.first.size

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        return (self.scale * self.first.matrix(weight) * self.second.matrix(weight)).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Lokr:
    """W + scale * kron(first, second): first (A, C), second (B, D) or (B, D, k, k), where O = A B and I = C D.

    The columns of the second are D and then k k, and stay in this order in the product.
    """

    first: Product | Full
    second: Product | Full
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the weight it is for."""
        (rows, columns), (more_rows, more_columns) = self.first.size, self.second.size
        return rows * more_rows, columns * more_columns

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        return (self.scale * torch.kron(self.first.matrix(weight), self.second.matrix(weight))).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class Full:
    """W + diff, a difference as large as the weight (or the bias, or a norm's)."""

    diff: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the weight it is for."""
        return self.diff.shape[0], self.diff[0].numel()

    def matrix(self, weight: Tensor) -> Tensor:
        """The difference in float32, on the weight's device."""
        return _like(self.diff, weight).reshape(self.size)

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        return self.matrix(weight).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class IA3:
    """W * (1 + factors), a factor for each output, or for each input."""

    factors: Tensor
    on_input: bool

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        return weight * _along(_like(self.factors, weight), weight, int(self.on_input))


@dataclass(frozen=True, eq=False)
class Dora:
    """magnitude * (W + dW) / |W + dW|, dW by another kind; the norm is that of each output's row, or each input's."""

    inner: Lora | Loha | Lokr | Full
    magnitude: Tensor
    on_input: bool

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a float32 weight, in its shape."""
        axis = int(self.on_input)
        changed = weight + self.inner.delta(weight)
        norm = changed.transpose(0, axis).flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).eps)
        return changed * _along(_like(self.magnitude, weight).flatten() / norm, weight, axis) - weight


Kind = Lora | Loha | Lokr | Full | IA3 | Dora


def size_of(kind: Kind) -> tuple[int, int] | None:
    """Rows and columns of the weight that a kind is for; None where it does not tell."""
    match kind:
        case IA3():
            return None
        case Dora(inner):
            return inner.size
        case _:
            return kind.size


def fits(kind: Kind, shape: tuple[int, ...]) -> bool:
    """Whether a kind can change a weight of this shape."""
    match kind:
        case IA3(factors, on_input) | Dora(_, factors, on_input):
            if len(shape) < 2 or factors.numel() != shape[on_input]:
                return False
    return size_of(kind) in (None, (shape[0], math.prod(shape[1:])))


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.device, torch.float32)


def _along(factors: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Factors in a shape that multiplies the weight along one axis."""
    return factors.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])

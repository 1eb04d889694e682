"""Means of few measurements, with their errors, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Z = 2.3263478740408408
"""What a normal variable exceeds once in a hundred times."""

FEW = 6
"""Below so many rows a spread between rows says nothing, and that between all cells stands in for it."""


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of that error."""

    value: float
    error: float
    freedom: int

    @property
    def noise(self) -> float:
        """What the mean exceeds once in a hundred times if nothing but chance is at work."""
        return 0.0 if self.error == 0 else student(self.freedom) * self.error

    def above(self, least: float = 0.0) -> bool:
        """Whether the value is greater than chance explains, and than `least`."""
        return self.value > max(self.noise, least)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.error, self.freedom)

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two independent means; Welch 1947, with the least that his degrees of freedom can be."""
        error = math.hypot(self.error, other.error)
        freedom = min((e.freedom for e in (self, other) if e.error), default=self.freedom)
        return Estimate(self.value - other.value, error, freedom)


def mean(values: Tensor) -> Estimate:
    """The mean of cells (N, T), whose error is that of N independent rows; below `FEW` rows, of all cells.

    N and T are one at least. The error of a single cell is infinite.
    """
    rows = values.double().mean(dim=1) if len(values) >= FEW else values.double().flatten()
    if len(rows) == 1:
        return Estimate(rows.item(), math.inf, 0)
    return Estimate(rows.mean().item(), (rows.var() / len(rows)).sqrt().item(), len(rows) - 1)


def student(freedom: int) -> float:
    """What Student's t exceeds once in a hundred times; exact to 2% (Abramowitz & Stegun 1964, 26.7.5)."""
    if freedom < 1:
        return math.inf
    if freedom == 1:
        return math.tan(math.pi * 0.49)
    if freedom == 2:
        return 0.98 / math.sqrt(2 * 0.99 * 0.01)
    z = Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )

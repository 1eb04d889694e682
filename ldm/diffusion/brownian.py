"""A Brownian path over sigma that a seed fixes at every level at once, whichever levels are asked for, in any order.

With noise of its own for every step, a sampler of the diffusion SDE draws another picture as soon as the steps are
others. Along one path it converges: more steps give the same picture, better (Kidger et al. 2021, "Brownian interval";
Li et al. 2020, "virtual Brownian tree").

The path is cut at the powers of two, which do not depend on where a sampler begins, and W(1) = 0. Between two of them
it is halved again and again (Levy's construction: the value in the middle is normal about the mean of the two ends,
with a quarter of the interval's length for variance). The normal numbers of every cut are a hash of the seed and of
where it is, so that nothing has to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DEPTH = 20
"""So often is an octave halved; the path is straight over a millionth of it."""

FLOOR = -24
"""Below 2^FLOOR there is one interval, down to 0."""

STREAM = 0x62726F776E  # apart from all else that a seed is good for
OCTAVES = 2048  # more than a float has


class BrownianPath:
    """W(sigma) of one picture, for sigma >= 0: normal increments of variance sigma - sigma', independent if disjoint.

    shape: of the picture's noise; seed, place: in 0..2^64-1, which path; `place` tells pictures of one seed apart
    """

    def __init__(self, shape: Sequence[int], seed: int, place: int = 0) -> None:
        self._shape, self._seed, self._place = tuple(shape), seed, place
        self._cuts = {0: torch.zeros(self._shape)}
        self._last = (1.0, self._cuts[0])

    def increment(self, sigma: float, sigma_next: float) -> Tensor:
        """W(sigma) - W(sigma_next), float32, on the CPU."""
        # A sampler begins a step where the last one ended, so one value is kept.
        last, value = self._last
        before = value if sigma == last else self._at(sigma)
        after = value if sigma_next == last else self._at(sigma_next)
        self._last = (sigma_next, after)
        return before - after

    def _at(self, sigma: float) -> Tensor:
        octave, start, width = FLOOR - 1, 0.0, 2.0**FLOOR
        if sigma >= 2.0**FLOOR:
            octave = math.frexp(sigma)[1] - 1
            start = width = 2.0**octave
        left, right = self._cut(octave), self._cut(octave + 1)
        share, node = (sigma - start) / width, 1
        for _ in range(DEPTH):
            if share == 0:
                return left
            middle = (left + right) / 2 + math.sqrt(width) / 2 * self._normal(octave, node)
            share, width = 2 * share, width / 2
            if share < 1:
                right, node = middle, 2 * node
            else:
                left, share, node = middle, share - 1, 2 * node + 1
        return left + share * (right - left)

    def _cut(self, octave: int) -> Tensor:
        """W(2^octave), or W(0) below the floor: the sum of the octaves between it and 1."""
        if octave not in self._cuts:
            if octave > 0:
                self._cuts[octave] = self._cut(octave - 1) + self._whole(octave - 1)
            else:
                self._cuts[octave] = self._cut(octave + 1) - self._whole(octave)
        return self._cuts[octave]

    def _whole(self, octave: int) -> Tensor:
        """The increment over an octave, W(2^(octave + 1)) - W(2^octave)."""
        return math.sqrt(2.0 ** max(octave, FLOOR)) * self._normal(octave, 0)

    def _normal(self, octave: int, node: int) -> Tensor:
        """The unit normal numbers of a cut: `node` 0 is the octave's end, 1 its middle, 2 n and 2 n + 1 are under n."""
        # The first word counts the numbers; the octave is shifted, since words have no sign.
        counter = np.array([0, node, octave + OCTAVES, self._place], dtype=np.uint64)
        bits = np.random.Philox(key=np.array([self._seed, STREAM], dtype=np.uint64), counter=counter)
        return torch.from_numpy(np.random.Generator(bits).standard_normal(self._shape, dtype=np.float32))

"""Normal numbers as PyTorch draws them on an NVIDIA GPU, on any device: Philox 4x32-10 (Salmon et al. 2011).

A generator that counts: its numbers are a hash of a counter, so that each of them can be computed alone. Every thread
of the GPU draws one of a tensor's numbers, as long as it has so many threads; AUTOMATIC1111 does the same on any device
("RNG: GPU" and "NV").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_WORD = 0xFFFFFFFF


class Philox:
    """The generator of one seed, 0..2^64-1. Each call of `randn` goes one further in the first word of its counter."""

    def __init__(self, seed: int) -> None:
        self._key = (seed & LOW_WORD, seed >> 32)
        self._drawn = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Unit normal numbers of this shape, float32, on the CPU; number i has i as the third word of its counter."""
        places = np.arange(math.prod(shape), dtype=np.uint64)
        zeros = np.zeros_like(places)
        first, second, *_ = philox((zeros + np.uint64(self._drawn), zeros, places, zeros), self._key)
        self._drawn += 1
        return torch.from_numpy(_box_muller(first, second).astype(np.float32)).reshape(tuple(shape))


Words = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]
"""Four 32-bit words, each held in 64 bits so that a product of two of them fits, (N,)."""


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words of each counter (Salmon et al. 2011, section 3.3)."""
    a, b, c, d = counter
    left, right = key
    shift, low = np.uint64(32), np.uint64(LOW_WORD)
    for _ in range(ROUNDS):
        p, q = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (q >> shift) ^ b ^ np.uint64(left), q & low, (p >> shift) ^ d ^ np.uint64(right), p & low
        left, right = (left + KEY_STEPS[0]) & LOW_WORD, (right + KEY_STEPS[1]) & LOW_WORD
    return a, b, c, d


def _box_muller(x: NDArray[np.uint64], y: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The first of the two normal numbers that two 32-bit words give (Box and Muller 1958), as cuRAND takes it.

    A GPU, and AUTOMATIC1111 with its rounded constants, come to the same within a millionth.
    """
    u, v = ((words.astype(np.float64) + 0.5) * 2.0**-32 for words in (x, y))
    radius: NDArray[np.float64] = np.sqrt(-2 * np.log(u))
    return np.multiply(radius, np.sin(2 * math.pi * v))

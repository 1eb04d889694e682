"""Which pictures a batch is of, which caption each is told by, and whether it is mirrored: the same for all objectives.

Ho & Salimans 2022 (dropped captions). Shapes: N pictures, M captions, B drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NO_CAPTION = -1
"""The row of texts that is of no caption: their last one."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn, (B,) each.

    pictures: numbers; mirrored: bool; captions: the row of one caption of each; rows: the same, or `NO_CAPTION`
    """

    pictures: np.ndarray
    mirrored: np.ndarray
    captions: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Draws:
    """Where batches come from.

    cumulative: (N,) float64, the probabilities of the pictures up to each; flips: (N,) bool, may picture i be mirrored;
    first[i] .. first[i + 1] are the rows of the captions of picture i
    """

    cumulative: Tensor
    flips: np.ndarray
    first: np.ndarray

    def pictures(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of pictures, by their probabilities; one of probability 0 never."""
        drawn = torch.rand(count, generator=generator).double()
        numbers = torch.searchsorted(self.cumulative, drawn, right=True)  # a draw of 0 is not picture 0's for that
        return numbers.clamp(max=len(self.cumulative) - 1).tolist()

    def told(self, pictures: Sequence[int], generator: torch.Generator, drop: float) -> Drawn:
        """A caption for each of these pictures. drop: how likely it is left out"""
        chosen = np.asarray(pictures)
        mirror, caption, leave_out = torch.rand(len(chosen), 3, generator=generator).double().numpy().T
        first, last = self.first[chosen], self.first[chosen + 1]
        captions = first + (caption * (last - first)).astype(np.int64)
        rows = np.where(leave_out < drop, NO_CAPTION, captions)
        return Drawn(chosen, self.flips[chosen] & (mirror < 0.5), captions, rows)


def draws_from(flips: np.ndarray, first: np.ndarray, held_out: Sequence[int], share: np.ndarray | None) -> Draws:
    """share: how likely each picture is drawn, None: all alike; those held out never are. The rest as in `Draws`."""
    share = np.ones(len(flips)) if share is None else share.copy()
    share[list(held_out)] = 0.0
    return Draws(torch.from_numpy(np.cumsum(share / share.sum())), flips, first)

"""What is trained, and how its batches are drawn: all that the loop knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """One micro-batch of a run.

    count:     its rows
    number:    of all micro-batches of the run, over steps, accumulation and processes: however many share the work,
               number n is the same pictures with the same noise
    generator: the source of all its randomness, see `step_generator`
    """

    count: int
    number: int
    generator: torch.Generator


def step_generator(seed: int, number: int) -> torch.Generator:
    """The source of all randomness of micro-batch `number`; torch's generator for the CPU heeds 32 bits of a seed."""
    return torch.Generator().manual_seed((seed * 2_654_435_761 + number) % 2**32)


class Objective(nn.Module):
    """What is trained: a module that holds the trained networks and knows its data.

    Called with a batch it returns scalars by name, of which "loss" is minimised.
    """

    def batch(self, draw: Draw) -> Batch:
        """One batch on the CPU, told by the draw alone and by no trained weight; any thread may ask for it."""
        raise NotImplementedError

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The trained parameters, and for each group of them what its rate is to the run's."""
        return [([p for p in self.parameters() if p.requires_grad], 1.0)]

    def rows_meet(self) -> bool:
        """Whether a row's loss depends on the others of its batch; then a resumed run must split batches as before."""
        return False

    def facts(self) -> dict[str, object]:
        """What, besides the LoopConfig, a resumed run must have in common with the one that was begun; plain data."""
        return {}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Figures to keep, with the averaged weights in place; pictures may be written into the folder.

        It is the first process that asks; where weights are split all do, of whom the first alone may write.
        """
        raise NotImplementedError


@contextmanager
def learning(objective: Objective) -> Iterator[None]:
    """Within, every module is as training has it, with dropout; then each is as it was, for some are others' too."""
    before = {module: module.training for module in objective.modules()}
    objective.train()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training

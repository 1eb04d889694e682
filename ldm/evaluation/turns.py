"""Several ways of doing the same thing, timed in turns, so that what slows the machine slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """One run: how long it took, what came out, and, of a process of its own, how many bytes it held at its peak."""

    seconds: float
    output: Tensor | None = None
    peak: int | None = None


Contestant = Callable[[], Measured]


def timed(run: Callable[[], Tensor], clock: Callable[[], float] = time.perf_counter) -> Contestant:
    """What runs it once without gradients, and waits for a GPU to be done. clock: in seconds."""

    @torch.inference_mode()
    def measure() -> Measured:
        begun = clock()
        output = run()
        if output.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - begun
        return Measured(seconds, output.detach().to("cpu", torch.float32))

    return measure


def in_turns(contestants: Mapping[str, Contestant], runs: int) -> dict[str, list[Measured]]:
    """The runs of each contestant, in rounds after one to warm up, every other round in the reverse order."""
    measured: dict[str, list[Measured]] = {name: [] for name in contestants}
    for number in range(runs + 1):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            run = contestants[name]()
            if number:
                measured[name].append(run)
    return measured


def median_seconds(runs: Sequence[Measured]) -> float:
    """The median of their times."""
    return median(run.seconds for run in runs)


def paired_ratio(ours: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """The median, over the rounds, of their time over ours: what drifts over minutes cancels in each."""
    return median(their.seconds / our.seconds for our, their in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Error:
    """How far a result is from its reference: the largest difference, and the norm of all over the reference's."""

    max: float
    l2: float


def error(output: Tensor, reference: Tensor) -> Error:
    """Of two tensors of one shape; ValueError where they are not."""
    if output.shape != reference.shape:
        raise ValueError(f"cannot compare {tuple(output.shape)} with {tuple(reference.shape)}")
    difference, reference = (output - reference).double(), reference.double()
    return Error(float(difference.abs().max()), float(difference.norm() / reference.norm()))


def psnr(output: Tensor, reference: Tensor) -> float:
    """Of pictures in [-1, 1], in dB; infinite where they are equal."""
    square = float((output.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean())
    return 10 * math.log10(4 / square) if square else math.inf

"""What a run will take, before it begins: counted where it can be, measured where it cannot."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ldm.data.buckets import Size
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.memory_saving import checkpointed
from ldm.training.engine.objective import Draw, step_generator
from ldm.training.engine.split import is_split
from ldm.training.tune.objective import TuneObjective

STATES = {"adamw": 8.0, "muon": 4.0, "adamw8bit": 2.1, "adafactor": 0.1, "prodigy": 16.0, "schedulefree": 8.0}
"""Bytes that an optimizer keeps for each trained number, about."""


@dataclass(frozen=True)
class Plan:
    """What is about to be done.

    pictures, held_out, regular: how many are trained on, only measured on, and of the class
    buckets:  pictures of each size; trained: numbers that are; epochs: how often all are shown
    seconds:  of all steps, measured on one; memory: bytes at the peak, so far as one step shows it
    """

    pictures: int
    held_out: int
    regular: int
    buckets: dict[Size, int]
    trained: int
    batch: int
    steps: int
    epochs: float
    seconds: float
    memory: int

    def lines(self) -> list[str]:
        """The same in words."""
        sizes = ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(self.buckets.items()))
        regular = f", {self.regular} of the class" if self.regular else ""
        memory = f"{self.memory / 2**30:.1f} GiB"
        return [
            f"pictures: {self.pictures} to train on{regular}, {self.held_out} held out",
            f"sizes: {sizes}",
            f"steps: {self.steps} of {self.batch} pictures, {self.epochs:.1f} times through all of them",
            f"trained: {in_words(self.trained)} numbers",
            f"takes: about {duration(self.seconds)} and the looks, {memory} (measured on one step)",
        ]


def plan(
    objective: TuneObjective,
    loop: LoopConfig,
    kept: Sequence[int],
    held_out: int,
    processes: int,
    less_memory: bool = False,
) -> Plan:
    """What this run will take. It asks for one step's gradients twice and forgets them: nothing is changed.

    less_memory: whether it will be `checkpointed`
    """
    with checkpointed(objective.networks) if less_memory else nullcontext():
        seconds = _seconds_a_batch(objective, loop)
    chosen = [objective.pictures[i] for i in kept]
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    whole = loop.batch * loop.accumulate * processes
    held = trained / processes if is_split(objective) else trained
    extra = held * (STATES[loop.optimizer] + 4.0)  # the optimizer's and the average's
    regular = sum(picture.example.regular for picture in chosen)
    return Plan(
        pictures=len(chosen) - regular,
        held_out=held_out,
        regular=regular,
        buckets=dict(Counter(picture.bucket for picture in chosen)),
        trained=trained,
        batch=whole,
        steps=loop.steps,
        epochs=loop.steps * whole / objective.epochs.shown,
        seconds=seconds * loop.accumulate * loop.steps,
        memory=round(peak_memory(objective.model.device) + extra),
    )


def _seconds_a_batch(objective: TuneObjective, loop: LoopConfig) -> float:
    """How long the gradients of the largest batch take, the second time."""
    sizes = [objective.pictures[objective.epochs.pictures(n)[0]].bucket for n in range(len(objective.epochs))]
    largest = max(range(len(sizes)), key=lambda n: sizes[n][0] * sizes[n][1])
    device = objective.model.device
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        draw = Draw(loop.batch, largest, step_generator(loop.seed, largest))
        batch = {name: tensor.to(device) for name, tensor in objective.batch(draw).items()}
        with objective.lower_precision():
            loss = objective(batch)["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        objective.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
    return seconds


def peak_memory(device: torch.device) -> int:
    """Bytes in use at the peak so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """1:05:00 and the like, in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def in_words(count: int) -> str:
    """1.5 million and the like."""
    if count < 1e4:
        return str(count)
    return f"{count / 1e3:.0f} thousand" if count < 1e6 else f"{count / 1e6:.1f} million"

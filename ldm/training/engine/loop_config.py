"""How long a run trains, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ldm.errors import LdmError

Precision = Literal["auto", "no", "fp16", "bf16"]
"""Of the arithmetic; no is float32. See `ldm.training.engine.precision`."""

OptimizerName = Literal["adamw", "muon", "adamw8bit", "adafactor", "prodigy", "schedulefree"]


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast. A step takes `accumulate` batches in each process.

    optimizer: see `ldm.training.engine.optimizers`; the rate means the same to all but Prodigy, which multiplies
               its own by it

    schedule: after `warmup` steps "constant" keeps the rate and lets it fall to nought over the last `cooldown` steps;
    "cosine" lets it fall all the way. The last step of a run is `steps`; a finished run may be given more.
    decayed: which weights decay: all, or matrices alone and no gains, biases or single numbers.
    workers: threads that prepare the next batches meanwhile; they change nothing but the time
    keep:    how many saves are kept
    best:    the figure of `Objective.evaluate` of whose least value the averaged weights are kept, see `load_best`
    """

    steps: int
    batch: int
    rate: float
    optimizer: OptimizerName = "adamw"
    warmup: int = 200
    schedule: Literal["constant", "cosine"] = "constant"
    cooldown: int = 0
    weight_decay: float = 0.01
    decayed: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    precision: Precision = "auto"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 1000
    keep: int = 2
    evaluate_every: int = 1000
    best: str | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (("accumulate", 1), ("keep", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise LdmError(f"{name}: found {getattr(self, name)}, expected {least} or more")


FREE_TO_CHANGE = {
    *("steps", "cooldown", "rate", "ema", "workers", "keep", "best"),
    *("save_every", "evaluate_every", "log_every", "compile", "precision"),
}
"""Fields of LoopConfig that a resumed run may have changed."""


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate at a step, 0-based."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        progress = min(1.0, step / max(1, config.steps))
        return config.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
    left = (config.steps - step) / config.cooldown if config.cooldown else 1.0
    return config.rate * warm * max(0.0, min(1.0, left))

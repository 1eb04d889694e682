"""The smallest objective that can be trained, for tests of the loop. Not a test itself."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.training.engine.loop import LoopConfig
from ldm.training.engine.objective import Draw, Objective

CONFIG = LoopConfig(
    steps=20, batch=4, rate=1e-2, warmup=3, ema=0.9, precision="no", save_every=5, evaluate_every=10, log_every=5
)


class Line(Objective):
    """Fit y = 2 x + 1; `poison` names steps whose loss is not finite."""

    def __init__(self, poison: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        self.poison, self.calls, self.losses, self.evaluated = poison, 0, [], []

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        return {"x": torch.randn(draw.count, 1, generator=draw.generator)}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = (self.layer(batch["x"]) - 2 * batch["x"] - 1).square().mean()
        if self.calls in self.poison:
            loss = loss * math.nan
        self.calls += 1
        self.losses.append(loss.item())
        return {"loss": loss}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        self.evaluated.append((step, self.layer.weight.item()))
        return {"weight": self.layer.weight.item()}

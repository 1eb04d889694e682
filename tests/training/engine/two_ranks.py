"""One of two processes that train together; `test_two_processes` starts both. Not a test itself.

Usage: two_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from line import CONFIG, Line
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.training.engine.loop import LoopConfig, train

TWICE = replace(CONFIG, accumulate=3, decayed="matrices", workers=2)
"""What each of two does; one process alone accumulates twice as much."""
STOP_AT = 7


class Net(Line):
    """Fit a curve, its places drawn anew in every batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = (self.layer(batch["x"]) - (3 * batch["x"]).sin()).square().mean()
        return {"loss": loss}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        return {"middle": float(self.layer(torch.zeros(1, 1)))}


def trained(config: LoopConfig, output: Path) -> dict[str, Tensor]:
    """The weights after the run, and their average."""
    net = Net()
    average = train(net, config, output)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return weights | {f"average.{name}": p for name, p in average.weights.items()}


def main(folder: Path) -> None:
    for optimizer in ("adamw", "schedulefree"):
        found = trained(replace(TWICE, optimizer=optimizer), folder / optimizer)
        save_file(found, folder / f"{optimizer}-{torch.distributed.get_rank()}.safetensors")
    trained(replace(TWICE, steps=STOP_AT), folder / "stopped")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One of two processes that train together; `test_two_processes` starts both. Not a test itself.

Usage: two_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from line import CONFIG, Line
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.split import split, whole

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


def trained(config: LoopConfig, output: Path, parted: bool = False) -> dict[str, Tensor]:
    """The weights after the run, and their average. parted: each process has its part of them alone."""
    net = Net()
    if parted:
        split([net.layer], torch.device("cpu"), torch.float32)
        held = sum(p.to_local().numel() for p in net.parameters() if isinstance(p, DTensor))
        assert held < 0.6 * sum(p.numel() for p in net.parameters())
    average = train(net, config, output)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return whole(weights | {f"average.{name}": p for name, p in average.weights.items()})


def main(folder: Path) -> None:
    for optimizer in ("adamw", "schedulefree"):
        found = trained(replace(TWICE, optimizer=optimizer), folder / optimizer)
        save_file(found, folder / f"{optimizer}-{torch.distributed.get_rank()}.safetensors")
    trained(replace(TWICE, steps=STOP_AT), folder / "stopped")
    found = trained(TWICE, folder / "split", parted=True)
    save_file(found, folder / f"split-{torch.distributed.get_rank()}.safetensors")
    trained(replace(TWICE, steps=STOP_AT), folder / "resumed", parted=True)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "resumed", folder / "stopped-split")
    torch.distributed.barrier()
    found = trained(TWICE, folder / "resumed", parted=True)
    save_file(found, folder / f"resumed-{torch.distributed.get_rank()}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One of two processes that train together; `test_clip_ranks` starts both. Not a test itself.

Usage: clip_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_clip import objective_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ldm.training.clip.objective import CLIPObjective
from ldm.training.engine.loop import LoopConfig, train
from ldm.training.engine.objective import Draw
from ldm.training.engine.ranks import first_rank_first, rank_and_ranks

CASES = [("softmax", 1), ("softmax", 2), ("sigmoid", 1), ("sigmoid", 2)]
"""Loss, and into how many parts a rank's batch is split."""
LOOP = LoopConfig(steps=6, batch=4, rate=1e-3, warmup=1, precision="no", save_every=10, evaluate_every=4, log_every=1)
STOP_AT = 3


def joint_batch(objective: CLIPObjective) -> dict[str, Tensor]:
    """Eight pairs, of which the first rank gets the first four."""
    return objective.batch(Draw(8, 0, torch.Generator().manual_seed(5)))


def gradients(loss: str, chunks: int) -> dict[str, Tensor]:
    """What this rank has after a step's backward pass under DistributedDataParallel, and its loss."""
    objective = objective_of(loss, chunks)  # type: ignore[arg-type]
    rank, _ = rank_and_ranks()
    batch = torch.load(Path(sys.argv[1]) / f"{loss}.pt", weights_only=True)
    half = {name: tensor.chunk(2)[rank] for name, tensor in batch.items()}
    together = DistributedDataParallel(objective)  # held, since it is what averages the gradients
    result = together(half)["loss"]
    result.backward()
    found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {**found, "loss": result.detach()}


class Stopped(CLIPObjective):
    """The second rank alone gets a SIGTERM, in its step number STOP_AT."""

    calls, stop = 0, False

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.stop and self.calls == STOP_AT and rank_and_ranks()[0] == 1:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(batch)


def trained(output: Path, *, stop: bool) -> dict[str, Tensor]:
    """The weights of this rank after the run."""
    objective = objective_of(kind=Stopped)
    assert isinstance(objective, Stopped)
    objective.stop = stop
    average = train(objective, LOOP, output)
    weights = {name: p.detach() for name, p in objective.named_parameters()}
    return weights | {f"average.{name}": p for name, p in average.weights.items()}


def main(folder: Path) -> None:
    with first_rank_first():
        (folder / f"entered-{rank_and_ranks()[0]}-of-{len(list(folder.glob('entered-*')))}").touch()
    rank, _ = rank_and_ranks()
    logging.basicConfig(level=logging.INFO, filename=folder / f"log-{rank}")
    for loss, chunks in CASES:
        save_file(gradients(loss, chunks), folder / f"{loss}-{chunks}-{rank}.safetensors")
    save_file(trained(folder / "whole", stop=False), folder / f"whole-{rank}.safetensors")
    try:
        trained(folder / "parts", stop=True)
    except SystemExit as stopped:
        (folder / f"stopped-{rank}").write_text(str(stopped.code))
    torch.distributed.barrier()
    if rank == 0:
        (folder / "saves").write_text(" ".join(path.name for path in (folder / "parts").glob("step-*")))
    torch.distributed.barrier()
    save_file(trained(folder / "parts", stop=False), folder / f"parts-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

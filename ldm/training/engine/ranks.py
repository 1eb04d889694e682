"""Which of the processes that train together this one is (a rank)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import DistributedType, PartialState

from ldm.errors import LdmError
from ldm.pipeline.device import choose_device

PATIENCE = timedelta(hours=6)
"""How long the other ranks wait while the first one prepares files or evaluates."""

SPLIT = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""How `accelerate launch` asks, by the environment, for weights that are split over the processes."""


def join(device: torch.device | None = None) -> torch.device:
    """Be one of the processes that train together, where a launcher has started several. Returns its own device.

    device: a CPU, or a GPU, of which each of several processes takes the one of its own number; None: as the launcher
    says, else a GPU where there is one. The first call in a process decides. Raises LdmError where weights would be
    split over processes, and for another device than this process has begun on.
    """
    if asked := [name for flag, name in SPLIT.items() if os.environ.get(flag, "").lower() in ("1", "true", "yes")]:
        raise LdmError(_unsupported(asked[0]))
    wanted = device or choose_device()
    if wanted.type == "cuda" and wanted.index is not None and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(wanted)
    state = PartialState(cpu=wanted.type == "cpu", timeout=PATIENCE)
    if state.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise LdmError(_unsupported(state.distributed_type.value))
    own = cast("torch.device", state.device)
    if device is not None and own.type != device.type:
        raise LdmError(f"device: found {device.type}, but this process has begun on {own.type}; start it anew")
    return own


def _unsupported(kind: str) -> str:
    return (
        f"accelerate: found {kind}, expected whole weights in every process; run accelerate config again, and where "
        "they do not fit, give ldm tune --shard"
    )


def rank_and_ranks() -> tuple[int, int]:
    """Which process this is, and of how many that train together; (0, 1) where there is but one."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def first_says(answer: bool) -> bool:
    """The first rank's answer, on all of them, which ask together."""
    if rank_and_ranks()[1] == 1:
        return answer
    answers: list[Any] = [answer]
    torch.distributed.broadcast_object_list(answers)
    return bool(answers[0])


@contextmanager
def first_rank_first(device: torch.device | None = None) -> Iterator[None]:
    """The other ranks wait, for six hours at most, until the first one has left this block: it may prepare files.

    device: as for `join`, which is called if it was not yet
    """
    join(device)
    with PartialState().main_process_first():
        yield

"""Which of the processes that train together this one is (a rank)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState


def rank_and_ranks() -> tuple[int, int]:
    """Which process this is, and of how many that train together; (0, 1) where there is but one."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The other ranks wait, for six hours at most, until the first one has left this block: it may prepare files."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
    with state.main_process_first():
        yield

"""Processes that find each other as a launcher's do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
RANKS = 2


def run_together(*command: str, folders: Sequence[Path] = ()) -> list[str]:
    """Run Python with these arguments in two processes, to their ends -> what each one printed.

    They meet at a store that this process has bound to a free port, so that no other can take it in between. folders:
    where they look for modules, besides the package. What still runs after an error or eight minutes is killed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders))),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=480) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * RANKS, "\n".join(text[-3000:] for _, text in said)
    return [out for out, _ in said]

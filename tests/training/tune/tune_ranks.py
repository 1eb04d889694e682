"""One of two processes that tune together; `test_tune_ranks` starts both. Not a test itself.

Usage: tune_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ldm.apps.cli import main
from ldm.training.tune import run

METHODS = {
    "lora": ["--method", "lora", "--rank", "2", "--text"],
    "full": ["--method", "full", "--text"],
    "split": ["--method", "full", "--text", "--shard"],
}


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
"""Any of these in what a file is opened with."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime")
"""Other ways to change a folder, as Python tells of them (`sys.addaudithook`); "os.rename" is a replacement too."""


def watch(folder: Path) -> set[str]:
    """What this process writes below `folder` from now on."""
    seen = set[str]()

    def told(event: str, facts: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and facts[2] & WRITING):
            paths = (
                Path(os.fsdecode(fact)).absolute() for fact in facts if isinstance(fact, str | bytes | os.PathLike)
            )
            seen.update(str(path) for path in paths if path.is_relative_to(folder))

    sys.addaudithook(told)
    return seen


def tune(folder: Path, name: str, output: Path, accumulate: int) -> int:
    """`ldm tune` for two steps of the tiny model in `folder`; its exit code."""
    flags = ["--base", str(folder / "tiny.safetensors"), "--output", str(output), "--cache", str(folder / "cache")]
    numbers = ["--steps", "2", "--batch", "2", "--accumulate", str(accumulate), "--looks", "2", "--rate", "1e-2"]
    plain = ["--precision", "no", "--held-out", "0", "--ema", "0", "--device", "cpu", "--sample", "red"]
    return main(["tune", str(folder / "pictures"), *METHODS[name], *flags, *numbers, *plain])


if __name__ == "__main__":
    here = Path(sys.argv[1])
    seen = watch(here)
    for method in METHODS:
        with patch.object(run, "split", wraps=run.split) as split:
            assert tune(here, method, here / f"two-{method}", 1) == 0
        assert split.called == (method == "split")
    (here.parent / f"wrote-{torch.distributed.get_rank()}.txt").write_text("\n".join(sorted(seen)))
    torch.distributed.destroy_process_group()

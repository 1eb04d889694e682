"""One of two processes that tune together; `test_tune_ranks` starts both. Not a test itself.

Usage: tune_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import torch

from ldm.apps.cli import main
from ldm.training.tune import run

METHODS = {
    "lora": ["--method", "lora", "--rank", "2", "--text"],
    "full": ["--method", "full", "--text"],
    "split": ["--method", "full", "--text", "--shard"],
}


def tune(folder: Path, name: str, output: Path, accumulate: int) -> int:
    """`ldm tune` for two steps of the tiny model in `folder`; its exit code."""
    flags = ["--base", str(folder / "tiny.safetensors"), "--output", str(output), "--cache", str(folder / "cache")]
    numbers = ["--steps", "2", "--batch", "2", "--accumulate", str(accumulate), "--looks", "2", "--rate", "1e-2"]
    plain = ["--precision", "no", "--held-out", "0", "--ema", "0", "--device", "cpu", "--sample", "red"]
    return main(["tune", str(folder / "pictures"), *METHODS[name], *flags, *numbers, *plain])


if __name__ == "__main__":
    here = Path(sys.argv[1])
    for method in METHODS:
        with patch.object(run, "split", wraps=run.split) as split:
            assert tune(here, method, here / f"two-{method}", 1) == 0
        assert split.called == (method == "split")
    torch.distributed.destroy_process_group()

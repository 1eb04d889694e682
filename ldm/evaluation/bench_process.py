"""One side of `ldm bench` in a process of its own, for what only a new process can tell: start-up, and peak memory.

Light, for what this module imports counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ldm.errors import LdmError, printable
from ldm.evaluation.bench_inputs import PLAIN, Setting, Work
from ldm.evaluation.turns import Measured

Side = Literal["bench_ours", "bench_diffusers"]
"""The module of this folder that such a process runs."""

Task = Literal["step", "picture"]
"""Load and take a step; or load and draw a picture."""


@dataclass(frozen=True)
class Fresh:
    """What a process of its own is told: which model, and what to do with it.

    file:   a single file, or a folder of diffusers; folder: the same model as diffusers has it
    answer: where the process writes what it measured, as JSON: {"seconds":, "peak":}
    begun:  `time.monotonic()` when it was started
    """

    task: Task
    file: Path
    folder: Path
    work: Work
    setting: Setting
    answer: Path
    begun: float
    threads: int

    def as_json(self) -> str:
        """One line, for the command line of that process."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Fresh:
        """The inverse of `as_json`."""
        told = json.loads(text)
        paths = {name: Path(told[name]) for name in ("file", "folder", "answer")}
        work = Work(**told["work"] | {"latent": tuple(told["work"]["latent"])})
        return Fresh(**told | paths | {"work": work, "setting": Setting(**told["setting"])})

    def tell(self, seconds: float) -> None:
        """Write the answer."""
        self.answer.write_text(json.dumps({"seconds": seconds, "peak": peak_bytes(self.work.device)}))


def peak_bytes(device: str) -> int | None:
    """The most that this process held: of a GPU's allocator, else resident memory since the process began.

    None where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():  # ru_maxrss begins with the parent's, under Linux
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_fresh(
    side: Side, task: Task, file: Path, folder: Path | None, work: Work, setting: Setting = PLAIN
) -> Measured:
    """What a new process of one side measures of itself: a "step" from its start to the end of the first step, less a
    warm step; a "picture" whole. Raises LdmError where it fails.

    folder: of diffusers; setting: theirs, and of no meaning for us
    """
    threads, package = torch.get_num_threads(), str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name:
        answer = Path(name) / "answer.json"
        asked = Fresh(task, file.absolute(), folder or file, work, setting, answer, time.monotonic(), threads)
        command = [sys.executable, "-m", f"ldm.evaluation.{side}", asked.as_json()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not answer.exists():
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise LdmError(f"{task} in a process of its own ({side}): failed: {printable(said)}")
        told = json.loads(answer.read_text())
    return Measured(told["seconds"], peak=told["peak"])

"""Whenever a run is killed, also inside a save, no more than one interval is lost, and what is left is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_fifty_kills_lose_nothing_that_was_saved(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kill_runs.py"), str(tmp_path), "0", "50"]
    path = os.pathsep.join([str(HERE.parents[2]), str(HERE)])
    told = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    inside, kills, runs, _ = map(int, told.stdout.split())
    assert kills == 50 and inside >= 15 and runs >= 2

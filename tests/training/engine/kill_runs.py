"""Runs that are killed at random moments and resumed; `test_kills` starts it. Not a test itself.

Usage: kill_runs.py FOLDER SEED KILLS. Prints how many kills fell inside a save. Each run is a fork of this process,
which has torch at hand already. Half of the kills come from outside at a random time; the other half strike right
before or after one of the calls by which a save reaches the disk.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from line import CONFIG, Line
from torch import Tensor, nn

from ldm.training.engine.loop import train
from ldm.training.engine.state import RunState, load_best, load_state

LOOP = replace(CONFIG, save_every=1, evaluate_every=2, log_every=3, keep=100, best="spread", rate=0.1, decayed="all")
SAVE_EVERY = 3
ON_DISK = [(os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "open")]
"""What a save does to the disk."""


class Net(Line):
    """Weights enough that a save takes a while."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.layer(batch["x"]) - batch["x"].square()).square().mean()}

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        return {"spread": float((self.layer(torch.linspace(-1, 1, 9)[:, None]) - step % 8 / 4).std())}


def same(one: RunState, other: RunState) -> bool:
    """Whether both hold the same step and the same tensors, to the bit."""
    return one.step == other.step and all(
        torch.equal(value, other.tensors[name][key])
        for name, held in one.tensors.items()
        for key, value in held.items()
    )


def fatal(call: Callable[..., Any], left: list[int], after: bool) -> Callable[..., Any]:
    """`call`, but this process is killed at the left[0]-th time, before or after it."""

    def wrapped(*told: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*told, **named)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def begin(output: Path, keep: int, fatal_call: int, after: bool, pipe: int) -> int:
    """Fork a run, which writes a byte into the pipe after every step; returns its process id."""
    child = os.fork()
    if child:
        return child
    if fatal_call:
        left = [fatal_call]
        for owner, name in ON_DISK:
            setattr(owner, name, fatal(getattr(owner, name), left, after))
    config = replace(LOOP, save_every=SAVE_EVERY, keep=keep)
    train(Net(), config, output, progress=lambda p: os.write(pipe, bytes([p.step])) and None)
    os._exit(0)


def main(folder: Path, seed: int, kills: int) -> None:
    chance, done, inside, number = random.Random(seed), 0, 0, 0
    os.fsync = lambda descriptor: None  # what a killed process wrote is not lost: a power cut alone would do that
    begun = time.perf_counter()
    train(Net(), LOOP, folder / "whole")
    usual = (time.perf_counter() - begun) / 2
    saves = {}
    for path in sorted((folder / "whole").glob("step-*")):
        (alone := folder / "alone" / path.name).mkdir(parents=True)
        shutil.copytree(path, alone / path.name)
        state = load_state(alone)
        assert state is not None
        saves[state.step] = state
    best = load_best(folder / "whole")
    assert len(saves) == LOOP.steps and best is not None
    while done < kills:
        output, reached, number = folder / f"run-{number}", 0, number + 1
        while True:
            from_inside = chance.random() < 0.5 and done < kills
            read, write = os.pipe()
            fatal_call = chance.randrange(1, 150) if from_inside else 0
            child = begin(output, chance.choice([1, 2]), fatal_call, chance.random() < 0.5, write)
            os.close(write)
            if not from_inside and done < kills:
                time.sleep(chance.uniform(0, usual))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            steps = os.read(read, 1000)
            os.close(read)
            reached = max([reached, *steps])
            state = load_state(output)
            assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
            if status:
                done, inside = done + 1, inside + from_inside
            if reached >= SAVE_EVERY:
                assert state is not None, f"run {number}: every save is lost after {reached} steps"
                assert state.step >= reached - SAVE_EVERY, f"run {number}: {reached} steps, {state.step} saved"
            assert state is None or same(state, saves[state.step]), f"run {number}: step {state.step} differs"
            if not status:
                break
        assert state is not None and state.step == LOOP.steps
        found = load_best(output)
        assert found is not None and same(found, best), f"run {number}: another best"
    print(inside, done, number, round(time.perf_counter() - begun))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

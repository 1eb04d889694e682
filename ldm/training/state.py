"""A run's state on disk: one folder a save, written whole or not at all.

    OUTPUT/step-00001000/  manifest.json  weights.safetensors  ema.safetensors  optimizer.safetensors

The manifest is written last and holds the SHA-256 of every file; a folder whose files do not agree with it is passed
over. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import LdmError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunState:
    """What is saved: the number of steps done, facts to check on resuming, and tensors by file name."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_state(output: Path, state: RunState, keep: int = 2) -> Path:
    """Write `state` as OUTPUT/step-N; older saves beyond the `keep` newest go once the new one is whole."""
    final = output / f"step-{state.step:08d}"
    temporary = output / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    hashes = {}
    for name, tensors in state.tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
        _sync(path)
        hashes[path.name] = _hash(path)
    manifest = {"step": state.step, "facts": state.facts, "files": hashes}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(temporary / MANIFEST)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(output)
    for old in _saves(output)[keep:]:
        shutil.rmtree(old)
    return final


def load_state(output: Path) -> RunState | None:
    """The newest whole save below OUTPUT, or None where there is none."""
    for folder in _saves(output):
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            files = manifest["files"]
            if any(_hash(folder / name) != expected for name, expected in files.items()):
                raise ValueError("a file was changed after it was saved")
            tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in files}
            return RunState(manifest["step"], manifest["facts"], tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: damaged (%s), passed over", folder, error)
    return None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors as 'parameter number.name'."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` took."""
    full = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def check_facts(output: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LdmError where a run is resumed with other facts than it was begun with."""
    for name, value in wanted.items():
        before = json.loads(json.dumps(saved.get(name)))
        now = json.loads(json.dumps(value))
        if before != now:
            raise LdmError(
                f"{output}: was begun with {name} = {before}, now {now}; give another --output or the former value"
            )


def _saves(output: Path) -> list[Path]:
    """Finished saves, newest first."""
    folders = [p for p in output.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(folders, reverse=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

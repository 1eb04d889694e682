"""A run's state on disk: one folder a save, written whole or not at all.

    OUTPUT/step-00001000/  manifest.json  weights.safetensors  ema.safetensors  optimizer.safetensors
    OUTPUT/best/           the same, of the averaged weights that did best

The manifest is written last and holds the SHA-256 of every file; a folder whose files do not agree with it is passed
over. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import printable
from ldm.weights.save import write_tensors

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
BEST = "best"


@dataclass(frozen=True)
class RunState:
    """What is saved: the number of steps done, facts to check on resuming, tensors by file name, and plain numbers."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any] = field(default_factory=dict)


def save_state(output: Path, state: RunState, keep: int = 2) -> Path:
    """Write `state` as OUTPUT/step-N; all but the `keep` newest saves up to it go once the new one is whole.

    Raises LdmError where it cannot be written; then nothing is left of it, and every earlier save is as it was.
    """
    final = output / f"step-{state.step:08d}"
    temporary = output / f"{final.name}.tmp"
    try:
        for left in output.glob("step-*.tmp"):  # by a run that was killed
            shutil.rmtree(left)
        manifest = _write(temporary, state)
        if _manifest(final) == manifest and _is_whole(final, manifest):
            return final
        _discard(final)
        temporary.rename(final)
        _sync(output)
    except (OSError, LdmError) as error:
        why = getattr(error, "strerror", None) or error
        raise LdmError(
            f"{printable(str(final))}: cannot be saved ({why}); make room or choose another --output, and resume: "
            "what was saved before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    saves = _saves(output)
    for old in [folder for folder in saves if folder.name > final.name] + saves[saves.index(final) + keep :]:
        _discard(old)
    return final


def load_state(output: Path) -> RunState | None:
    """The newest whole save below OUTPUT, or None where there is none."""
    for folder in _saves(output):
        try:
            manifest = _manifest(folder)
            if manifest is None or not _is_whole(folder, manifest):
                raise ValueError("a file is missing, or was changed after it was saved")
            tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in manifest["files"]}
            return RunState(manifest["step"], manifest["facts"], tensors, manifest.get("numbers", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: damaged (%s), passed over", folder, error)
    return None


def saved_facts(output: Path) -> dict[str, Any]:
    """The facts of the newest save below OUTPUT, at the cost of its manifest alone; none where there is none."""
    manifests = (_manifest(folder) for folder in _saves(output))
    return next((told["facts"] for told in manifests if isinstance(told, dict) and "facts" in told), {})


def load_best(output: Path) -> RunState | None:
    """The averaged weights that did best (`LoopConfig.best`) as tensors["ema"], and their step; None before any did."""
    return load_state(output / BEST)


def check_facts(output: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LdmError where a run is resumed with other facts than it was begun with; new facts are not compared."""
    for name, value in wanted.items():
        now = json.loads(json.dumps(value))
        before = saved.get(name, now)
        if before != now:
            raise LdmError(
                f"{output}: was begun with {name} = {before}, now {now}; give another --output or the former value"
            )


def _write(folder: Path, state: RunState) -> dict[str, Any]:
    """All files of a save, on disk when this returns its manifest."""
    folder.mkdir(parents=True)
    for name, tensors in state.tensors.items():
        write_tensors(folder / f"{name}.safetensors", tensors, {})
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir())}
    manifest = {"step": state.step, "facts": state.facts, "numbers": state.numbers, "files": hashes}
    text = json.dumps(manifest, indent=1)
    (folder / MANIFEST).write_text(text)
    _sync(folder / MANIFEST)
    _sync(folder)
    return json.loads(text)


def _manifest(folder: Path) -> Any:
    """What the manifest of a save says; None where there is none, or none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    return all((folder / name).is_file() and _hash(folder / name) == sha for name, sha in manifest["files"].items())


def _discard(folder: Path) -> None:
    """Remove a save; one that is half removed goes by another name."""
    if folder.exists():
        gone = folder.rename(folder.with_name(f"{folder.name}.tmp.tmp"))
        shutil.rmtree(gone)


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

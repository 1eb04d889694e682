"""Results of `ldm bench` on disk: a JSON file for each kind of machine, to which every run adds what it measured."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ldm import __version__
from ldm.errors import LdmError, printable
from ldm.evaluation import bench_diffusers
from ldm.evaluation.bench import BY_COMPILING, Entry
from ldm.pipeline.device import multiplies_bfloat16
from ldm.weights.atomic import replacing

LIMIT = 2**24
"""Of a file of results, in bytes."""


def machine(device: str) -> dict[str, Any]:
    """The kind of machine: what does not change from run to run."""
    gpu = torch.device(device).type == "cuda"
    return {
        "cpu": _cpu(),
        "arithmetic": _arithmetic(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Of all that times depend on."""
    return {
        "ldm": __version__,
        "torch": torch.__version__,
        "diffusers": bench_diffusers.installed(),
        "python": platform.python_version(),
    }


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry with its unit in the names of what it measured: ours_s, theirs_best_s, or ours_bytes ...

    What is not finite, as the dB of two equal pictures, is null.
    """
    told = asdict(entry)
    unit = told.pop("unit")
    named = {f"{name}_{unit}": told.pop(name) for name in ("ours", "theirs_best", "theirs_default")}
    part, size, runs = (told.pop(name) for name in ("part", "size", "runs"))
    del part  # which is the key
    finite = {name: None if value in (math.inf, -math.inf) or value != value else value for name, value in told.items()}
    return {"size": size, "runs": runs, **named, **finite}


def by_part(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """The entries by part, or by part and size, as "step 512", where a part was measured at several."""
    entries = list(entries)
    parts = [entry.part for entry in entries]
    several = {part for part in parts if parts.count(part) > 1}
    return {f"{entry.part} {entry.size}" if entry.part in several else entry.part: as_json(entry) for entry in entries}


def save(folder: Path, model: str, device: str, entries: Iterable[Entry]) -> Path:
    """Add the entries to this kind of machine's file, in place of what it has of the same ones before.

    Its keys: "machine" as `machine` says, and "results", by model, and then by part, size, way and threads.
    Returns its path. Raises LdmError where it is not such a file, or the folder cannot be written to.
    """
    here = machine(device)
    told = (
        ", ".join(str(here[name]) for name in ("gpu", "cpu", "arithmetic") if here[name]) + f", {here['cores']} cores"
    )
    path = folder / (re.sub(r"[^a-z0-9]+", "-", told.lower()).strip("-")[:100] + ".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise LdmError(f"{printable(str(folder))}: cannot be made: {failure.strerror}; choose another folder") from None
    content: dict[str, Any] = _read(path) if path.exists() else {"results": {}}
    now = {"threads": torch.get_num_threads(), "date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": versions()}
    of_model = content["results"].setdefault(model, {})
    for entry in entries:
        how = BY_COMPILING if ((entry.settings or {}).get("ours") or "").endswith(BY_COMPILING) else ""
        of_model[f"{entry.part} {entry.size}{how}, {now['threads']} threads"] = as_json(entry) | now
    with replacing(path) as file:
        file.write((json.dumps({"machine": here, "results": content["results"]}, indent=1) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    name = printable(str(path))
    try:
        content = json.loads(path.read_bytes()[:LIMIT])
    except (OSError, ValueError):
        raise LdmError(f"{name}: cannot be read as JSON; move it away, and measure again") from None
    results = content.get("results") if isinstance(content, Mapping) else None
    if not isinstance(results, dict) or not all(isinstance(of_model, dict) for of_model in results.values()):
        raise LdmError(f"{name}: holds no results of ldm bench; choose another folder")
    return {"results": results}


def _arithmetic() -> str:
    """The widest vectors that torch computes with on the CPU, and whether bfloat16 is among its numbers."""
    wide = torch.backends.cpu.get_cpu_capability()
    return f"{wide}, bfloat16" if multiplies_bfloat16(torch.device("cpu")) else wide


def _cpu() -> str:
    """Its name, as the system has it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()

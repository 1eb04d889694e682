"""`ldm bench`: how fast this machine draws, and how fast diffusers does, as a table or as JSON."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from ldm.apps.output.progress import to_stderr
from ldm.errors import LdmError, printable
from ldm.evaluation.bench import Entry, MeasureTuning, Part, Plan
from ldm.evaluation.bench import bench as measure
from ldm.evaluation.bench_results import by_part, machine, save, versions
from ldm.pipeline.device import choose_device
from ldm.pipeline.load import shipped_model

if TYPE_CHECKING:
    from ldm.apps.flags.commands import Bench

COLUMNS = ("part", "size", "ours", "best", "default", "to best", "to default", "error", "theirs")


def bench(command: Bench) -> None:
    """Print what was measured, and keep it where that is asked for. Raises LdmError for what cannot be measured."""
    plan = plan_of(command)
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    device = str(choose_device(plan.device))
    model = plan.model.name if isinstance(plan.model, Path) else plan.model
    entries: list[Entry] = []
    for entry in measure(plan, to_stderr, tuning=_tuning(plan)):
        entries.append(entry)
        if command.save is not None:  # at once, for the next one may take minutes
            to_stderr(f"kept in {printable(str(save(command.save, model, device, entries)))}")
    if command.json:
        told: dict[str, Any] = {"model": model, "machine": machine(device), "versions": versions()}
        print(json.dumps(told | {"threads": torch.get_num_threads()} | by_part(entries), indent=2))
    else:
        Console().print(table(entries))
        for line in notes(entries):
            print(line)


def plan_of(command: Bench) -> Plan:
    """The flags as a plan. Raises LdmError for values that cannot be."""
    if command.preset is not None and command.file is not None:
        raise LdmError("model: found both --model and --preset, expected one of them")
    if command.threads is not None and not 1 <= command.threads <= 1024:
        raise LdmError(f"threads: found {command.threads}, expected 1 to 1024")
    model = command.preset or command.file or shipped_model()
    return Plan(
        model,
        _parts(command.parts),
        _sizes(command.size),
        command.runs,
        command.steps,
        command.alone,
        command.device,
        command.compile,
    )


def _tuning(plan: Plan) -> MeasureTuning | None:
    """What measures the part tune, which needs packages that nothing else here does."""
    if "tune" not in plan.parts:
        return None
    if missing := next((package for package in ("accelerate", "peft") if find_spec(package) is None), None):
        raise LdmError(f'tune: {missing} is not installed; pip install "ldm[tune]", or leave the part out')
    from ldm.training.tune.bench import bench_tuning

    return bench_tuning


def _parts(named: str) -> tuple[Part, ...]:
    known: dict[str, Part] = {part: part for part in get_args(Part)}
    names = [name.strip() for name in named.split(",")]
    if wrong := next((name for name in names if name not in known), None):
        raise LdmError(f"parts: found {printable(wrong)}, expected some of {','.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _sizes(named: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(size) for size in named.split(","))) if named else ()
    except ValueError:
        raise LdmError(f"size: found {printable(named)}, expected sides in pixels as 256,512") from None


def table(entries: list[Entry]) -> Table:
    """A row for each entry: ours, diffusers at its best and by default, both over ours, the errors of the first two.

    Errors are relative ones, or dB where pictures are compared.
    """
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        rows.add_column(name, justify="left" if name == "part" else "right")
    for entry in entries:
        measured = (entry.ours, entry.theirs_best, entry.theirs_default)
        rows.add_row(
            entry.part,
            str(entry.size),
            *(_amount(value, entry.unit) for value in measured),
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in (entry.ratio, entry.ratio_default)),
            _error(entry.l2_error, entry.psnr_db),
            _error(entry.theirs_l2_error, entry.theirs_psnr_db),
        )
    return rows


def notes(entries: list[Entry]) -> list[str]:
    """What the table does not say: how each side was run, and why something is missing. A line each, none twice."""
    lines: dict[str, None] = {}
    for entry in entries:
        sides = entry.settings or {}
        said = "; ".join(f"{side.replace('_', ' ')}: {how}" for side, how in sides.items() if how)
        lines[f"{entry.part} {entry.size}: {said}; the median of {entry.runs}"] = None
    return [*lines, *dict.fromkeys(entry.note for entry in entries if entry.note)]


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.3g} s" if unit == "s" else f"{value / 2**20:.0f} MiB"


def _error(l2: float | None, decibels: float | None) -> str:
    if decibels is not None:
        return f"{decibels:.1f} dB"
    return "" if l2 is None else f"{l2:.2g}"

"""`ldm info PATH`: what a file is, by which evidence, and what is wrong with it; of a folder a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ldm.apps.output.info_page import commands, page, table
from ldm.errors import LdmError
from ldm.weights.doctor.describe import describe, describe_folder, is_one_model
from ldm.weights.doctor.report import FileReport
from ldm.weights.io import printable


def info(path: str | Path, *, as_json: bool = False, deep: bool = False, allow_pickle: bool = False) -> None:
    """Print what a file or folder is. Raises LdmError where it is no model, or a broken one.

    A file with a problem (its end or a tensor is missing, tensors are of another shape, numbers are not finite where
    `deep` looked at them) is printed too, and its problem then raised: `ldm info` ends with exit code 2.
    """
    path = Path(path)
    if path.is_dir() and not is_one_model(path):
        _folder(path, as_json=as_json)
        return
    report = describe(path, deep=deep, allow_pickle=allow_pickle)
    if as_json:
        print(json.dumps(as_json_object(report), indent=2))
    else:
        Console().print(page(report))
        for line in commands(report):
            print(line)
    if report.problem:
        raise LdmError(f"{printable(report.path)}: {report.problem}")


def as_json_object(report: FileReport) -> dict[str, Any]:
    """The report as JSON has it: the same keys for every kind of file, null or empty where a kind has no such thing."""
    told = asdict(report)
    return {**told.pop("found"), **told}


def _folder(path: Path, *, as_json: bool) -> None:
    """The table of a folder. Raises LdmError where there is nothing to list, or something in it has a problem."""
    entries = list(describe_folder(path))
    if not entries:
        raise LdmError(f"{printable(str(path))}: holds no model files; expected .safetensors, .ckpt, .pt or .bin")
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
    else:
        console = Console()
        console.print(table(entries, console.width))
    if broken := [entry.name for entry in entries if entry.problem]:
        raise LdmError(
            f"{printable(str(path))}: {len(broken)} of {len(entries)} models have a problem, as {printable(broken[0])}"
        )

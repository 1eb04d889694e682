"""What a run measures on its way, in OUTPUT/figures.jsonl: a line for each time it looked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ldm.errors import LdmError
from ldm.weights.atomic import replacing
from ldm.weights.io import printable

NAME = "figures.jsonl"


@dataclass(frozen=True)
class Figures:
    """step: how many were done; of: the steps since the last ("training", their means), or the averaged weights."""

    step: int
    of: Literal["training", "evaluation"]
    values: dict[str, float]


def append_figures(output: Path, figures: Figures) -> None:
    """Add a line, on disk when this returns. Raises LdmError where it cannot be."""
    path = output / NAME
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figures)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LdmError(f"{printable(str(path))}: cannot be written ({error.strerror}); make room and resume") from error


def read_figures(output: Path) -> list[Figures]:
    """All lines; one that was cut short by a crash is left out."""
    path = output / NAME
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(Figures(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def cut_figures(output: Path, step: int) -> None:
    """Forget what was measured after `step`: the run goes on from there, and will measure it again."""
    path = output / NAME
    if path.exists():
        kept = [json.dumps(asdict(figures)) + "\n" for figures in read_figures(output) if figures.step <= step]
        with replacing(path) as file:
            file.write("".join(kept).encode())


def mean(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over steps that have the same ones; nothing of none."""
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]} if figures else {}


def in_words(figures: dict[str, float]) -> str:
    """Names and values on one line."""
    return " ".join(f"{name} {value:.4f}" for name, value in figures.items())

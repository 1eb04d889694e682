"""`ldm info FILE`: what a file is, by which evidence, and what is wrong with it, on one page or as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ldm.errors import LdmError
from ldm.weights.config_json import CONFIG_KEY
from ldm.weights.detect import CHECKPOINT, PARTS, Detection, detect, kind_of
from ldm.weights.io import Header, printable, read_header, read_tensors
from ldm.weights.layout import Comparison, build, compare
from ldm.weights.save import HASH

SHOWN = 10
"""How many names or metadata entries the page shows of a list; JSON has them all."""


@dataclass(frozen=True)
class PartReport:
    """One network's share of a file."""

    name: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class System:
    """What a checkpoint was found to be, and which rules decided."""

    family: str
    family_rule: str
    variant: str
    prediction: str
    prediction_rule: str
    zero_terminal_snr: bool
    resolution: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DeepReport:
    """What only all of the numbers tell.

    sha256: of the whole file; other programs show its first 10 digits as the model's hash
    hash_agrees: whether the file's own `modelspec.hash_sha256` is right; None where it has none
    non_finite, all_zero: tensors with NaN or infinite numbers; matrices and kernels of nothing but zeros
    """

    sha256: str
    hash_agrees: bool | None
    non_finite: tuple[str, ...]
    all_zero: tuple[str, ...]


@dataclass(frozen=True)
class FileReport:
    """All that is known of a file. problem: why nobody should load it, in one line."""

    path: str
    size: int
    kind: str
    parts: tuple[PartReport, ...]
    ema: bool
    system: System | None
    fit: Comparison | None
    problem: str | None
    metadata: Mapping[str, str]
    deep: DeepReport | None


def info(path: str | Path, *, as_json: bool = False, deep: bool = False) -> None:
    """Print what a file is. Raises LdmError where it is no .safetensors file, or a broken one.

    A file with a problem (tensors that are missing or of another shape, numbers that are not finite where `deep` looked
    at them) is printed too, and its problem then raised: `ldm info` ends with exit code 2.
    """
    report = inspect(path, deep=deep)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        Console().print(page(report))
    if report.problem:
        raise LdmError(f"{printable(report.path)}: {report.problem}")


def inspect(path: str | Path, *, deep: bool = False) -> FileReport:
    """Find out what a file is from its header alone; `deep` reads every number too.

    A model that does not load still gets a report. Raises LdmError where it is no .safetensors file, or a broken one.
    """
    header = read_header(path)
    kind = kind_of(header.tensors)
    system, fit, problem = None, None, None
    if kind == CHECKPOINT:
        try:
            detection = detect(header)
            system = _system(detection)
            fit = compare(header.tensors, build(detection.config))
            problem = None if fit.fits else "its tensors do not fit its networks"
        except LdmError as error:
            problem = str(error).removeprefix(f"{printable(str(header.path))}: ")
    numbers = _deep(header) if deep else None
    if numbers and numbers.non_finite and not problem:
        problem = f"{len(numbers.non_finite)} of its tensors hold numbers that are not finite"
    return FileReport(
        path=str(path),
        size=header.stamp.size,
        kind=kind,
        parts=_parts(header),
        ema=any(name.startswith("model_ema.") for name in header.tensors),
        system=system,
        fit=fit,
        problem=problem,
        metadata=header.metadata,
        deep=numbers,
    )


def page(report: FileReport) -> RenderableType:
    """The report as a table of two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(Text(name), Text(printable(value)))
    parts = Table(box=None, pad_edge=False)
    for heading in ("part", "tensors", "parameters", "dtypes"):
        parts.add_column(heading, justify="left" if heading in ("part", "dtypes") else "right")
    for part in report.parts:
        parts.add_row(part.name, f"{part.tensors:,}", f"{part.parameters:,}", ", ".join(part.dtypes))
    return Group(table, Text(), parts)


def _rows(report: FileReport) -> Iterable[tuple[str, str]]:
    """The page's lines: what it is, then what is wrong, then what it says of itself."""
    yield "file", report.path
    yield "size", f"{report.size:,} bytes"
    yield "kind", report.kind
    if report.problem:
        yield "PROBLEM", report.problem
    if report.system:
        yield from _system_rows(report.system)
        yield "EMA weights", "yes" if report.ema else "no"
    if report.fit:
        for name in ("missing", "unexpected", "misshapen", "unknown"):
            if names := getattr(report.fit, name):
                yield name, _some(names)
        if report.fit.not_needed:
            yield "not needed", ", ".join(f"{count} {kind}" for kind, count in report.fit.not_needed.items())
    if report.deep:
        yield from _deep_rows(report.deep)
    told = {key: value for key, value in report.metadata.items() if key != CONFIG_KEY}
    for key in sorted(told, key=lambda key: (not key.startswith("modelspec."), key))[:SHOWN]:
        yield _cut(key, 40), _cut(told[key], 100)
    if len(told) > SHOWN:
        yield "more metadata", f"{len(told) - SHOWN} entries (see --json)"


def _system_rows(system: System) -> Iterable[tuple[str, str]]:
    yield "family", f"{system.family}, {system.variant} (by {system.family_rule})"
    terminal = ", zero terminal SNR" if system.zero_terminal_snr else ""
    yield "prediction", f"{system.prediction}{terminal} (by {system.prediction_rule})"
    yield "resolution", f"{system.resolution} x {system.resolution}"
    for note in system.notes:
        yield "note", note
    for warning in system.warnings:
        yield "WARNING", warning


def _deep_rows(deep: DeepReport) -> Iterable[tuple[str, str]]:
    yield "model hash", f"{deep.sha256[:10]} (sha256 {deep.sha256})"
    verdicts = {True: "agrees with its numbers", False: "DOES NOT AGREE with its numbers", None: "none in the file"}
    yield "hash in the file", verdicts[deep.hash_agrees]
    yield "not finite", _some(deep.non_finite) if deep.non_finite else "none"
    if deep.all_zero:
        yield "all zero", _some(deep.all_zero)


def _parts(header: Header) -> tuple[PartReport, ...]:
    """Tensors by network; what belongs to none comes last."""
    prefixes = (*PARTS, ("model_ema.", "EMA weights"), ("", "other tensors"))
    grouped: dict[str, list[str]] = {name: [] for _, name in prefixes}
    for tensor in header.tensors:
        grouped[next(name for prefix, name in prefixes if tensor.startswith(prefix))].append(tensor)
    return tuple(
        PartReport(
            name=part,
            tensors=len(names),
            parameters=sum(header.tensors[name].count for name in names),
            dtypes=tuple(sorted({header.tensors[name].dtype for name in names})),
        )
        for part, names in grouped.items()
        if names
    )


def _system(detection: Detection) -> System:
    config = detection.config
    return System(
        family=config.family,
        family_rule=detection.family_rule,
        variant=detection.variant,
        prediction=config.prediction,
        prediction_rule=detection.prediction_rule,
        zero_terminal_snr=config.zero_terminal_snr,
        resolution=config.size,
        notes=detection.notes,
        warnings=detection.warnings,
    )


def _deep(header: Header) -> DeepReport:
    """Read the whole file: hashes, and a look at every number."""
    whole, numbers = hashlib.sha256(), hashlib.sha256()
    with header.path.open("rb") as file:
        whole.update(file.read(header.data_start))
        while chunk := file.read(1 << 20):
            whole.update(chunk)
            numbers.update(chunk)
    non_finite, all_zero = [], []
    for name, tensor in read_tensors(header, header.tensors):
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not torch.isfinite(values).all():
            non_finite.append(name)
        elif values.ndim > 1 and not values.any():
            all_zero.append(name)
    said = header.metadata.get(HASH)
    agrees = None if said is None else said.removeprefix("0x").lower() == numbers.hexdigest()
    return DeepReport(whole.hexdigest(), agrees, tuple(non_finite), tuple(all_zero))


def _some(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{rest}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."

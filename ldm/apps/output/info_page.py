"""The page that `ldm info` prints of a file, and the table of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ldm.apps.output.rows import grid
from ldm.weights.config_json import CONFIG_KEY
from ldm.weights.doctor.adapter import AdapterFacts
from ldm.weights.doctor.report import FileReport, FolderEntry, Hashes, Numbers, System
from ldm.weights.hashes import MODELSPEC_HASH
from ldm.weights.io import printable
from ldm.weights.layout import Comparison

SHOWN = 10
"""How many names or metadata entries the page shows of a list; JSON has them all."""

FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "ldm": "this package's own",
}

TOLD = (
    CONFIG_KEY, MODELSPEC_HASH, "format", "modelspec.sai_model_spec", "modelspec.implementation",
    "modelspec.prediction_type", "modelspec.resolution",
)  # fmt: skip
"""Metadata that other lines tell of, or that tell nothing."""


def page(report: FileReport) -> RenderableType:
    """What is known of a file: what it is and what is wrong with it, then its parts, then what it says of itself."""
    blocks = [
        grid(_identity(report)),
        _parts(report) if report.parts else None,
        grid(_training(report)),
        grid(_metadata(report.metadata)),
        grid(_hashes(report.hashes, report.numbers)),
        grid(_uses(report)),
    ]
    shown = [block for block in blocks if block is not None]
    return Group(*(Padding(block, (0, 0, index < len(shown) - 1, 0)) for index, block in enumerate(shown)))


def commands(report: FileReport) -> list[str]:
    """What can be done, and the command for it, below the page: lines that nothing may fold, to be copied whole."""
    return [printable(line) for remedy in report.remedies for line in ("", f"{remedy.what}:", f"  {remedy.command}")]


def table(entries: Sequence[FolderEntry], width: int) -> RenderableType:
    """A folder's models, a line each, in so many columns of the terminal. What does not fit ends in dots."""
    kinds = [entry.kind.removeprefix("textual-inversion ") for entry in entries]
    rows = [
        (entry.name, kind, entry.family or "", _size(entry.size), entry.problem or "")
        for entry, kind in zip(entries, kinds, strict=True)
    ]
    lines = Table(box=None, pad_edge=False, header_style="bold")
    left = width
    for index, (heading, widest) in enumerate((("name", 27), ("kind", 17), ("family", 12), ("size", 8))):
        needed = min(widest, max(len(heading), *(len(printable(row[index])) for row in rows)))
        justify = "right" if heading == "size" else "left"
        lines.add_column(heading, overflow="ellipsis", no_wrap=True, width=needed, justify=justify)
        left -= needed + 2
    lines.add_column("problem", overflow="ellipsis", no_wrap=True, width=max(10, left))
    for row in rows:
        lines.add_row(*(Text(printable(cell)) for cell in row), style="bold red" if row[-1] else "")
    return lines


def _identity(report: FileReport) -> Iterator[tuple[str, str]]:
    found = report.found
    yield "file", report.path
    yield "size", f"{_size(report.size)} ({report.size:,} bytes), {report.layout}"
    yield "kind", found.adapter.title if found.adapter else report.kind
    if report.problem:
        yield "PROBLEM", report.problem
    for warning in report.warnings:
        yield "WARNING", warning
    if report.pickle and report.pickle.verdict != report.problem:
        yield "pickle", report.pickle.verdict
    if found.system:
        yield from _system(found.system, ema=report.ema)
    elif found.family and (found.variant or not found.base):
        yield "family", ", ".join(filter(None, (FAMILIES[found.family], found.variant)))
    elif found.variant:
        yield "for", found.variant
    if found.base:
        yield "works with", found.base
    if found.adapter:
        yield from _adapter(found.adapter)
    for embedding in found.embeddings:
        count = "1 vector" if embedding.vectors == 1 else f"{embedding.vectors} vectors"
        yield "embedding", f"{embedding.name!r}, {count} of {' and '.join(map(str, embedding.widths))} numbers"
    if found.fit:
        yield from _fit(found.fit, whole=report.size >= report.needed)


def _system(system: System, *, ema: bool) -> Iterator[tuple[str, str]]:
    yield "family", f"{FAMILIES[system.family]}, {system.variant} ({system.family_rule})"
    terminal = ", zero terminal SNR" if system.zero_terminal_snr else ""
    yield "prediction", f"{system.prediction}{terminal} ({system.prediction_rule})"
    yield "resolution", f"{system.resolution} x {system.resolution}"
    yield "EMA", "a second, averaged copy of the U-Net is in it" if ema else "no copy"
    for note in system.notes:
        yield "note", note


def _adapter(adapter: AdapterFacts) -> Iterator[tuple[str, str]]:
    if len(adapter.kinds) > 1:
        yield "layers", ", ".join(f"{count} of {kind}" for kind, count in adapter.kinds.items())
    counts = [f"{count} layer{'' if count == 1 else 's'} of the {net}" for net, count in adapter.networks.items()]
    untouched = "" if any(name.startswith("text") for name in adapter.networks) else "; no text encoder"
    yield "changes", f"{', '.join(counts)}{untouched}"
    yield "targets", ", ".join(adapter.targets)
    if adapter.ranks:
        alphas = f", alpha {_some(_number(alpha) for alpha in adapter.alphas)}" if adapter.alphas else ", no alpha"
        yield "rank", f"{_some(map(str, adapter.ranks))}{alphas}"
    yield "names", f"as {adapter.style} writes them" if adapter.style != "unknown names" else adapter.style
    if adapter.bundled:
        yield "embeddings", f"rides along: {_some(adapter.bundled)}"


def _fit(fit: Comparison, *, whole: bool) -> Iterator[tuple[str, str]]:
    for name in ("missing", "unexpected", "misshapen", "unknown"):
        if names := getattr(fit, name):
            yield name, f"{len(names)}: {_some(names)}"
    if fit.fits and whole:
        yield "tensors", "all there, in the right shapes"
    if fit.not_needed:
        yield "not needed", ", ".join(f"{count} {kind}" for kind, count in fit.not_needed.items())


def _parts(report: FileReport) -> Table:
    parts = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("part", "tensors", "parameters", "size", "dtypes"):
        parts.add_column(heading, justify="left" if heading in ("part", "dtypes") else "right", no_wrap=True)
    for part in report.parts:
        parts.add_row(part.name, f"{part.tensors:,}", f"{part.parameters:,}", _size(part.size), ", ".join(part.dtypes))
    return parts


def _training(report: FileReport) -> Iterator[tuple[str, str]]:
    for index, (what, said) in enumerate(report.training.items()):
        yield f"{'trained:' if index == 0 else '':8} {what}", _cut(said, 240)


def _metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Entries that no other line tells of, ModelSpec's first."""
    told = {key: value for key, value in metadata.items() if key not in TOLD and not key.startswith(("ss_", "sshs_"))}
    for key in sorted(told, key=lambda key: (not key.startswith("modelspec."), key))[:SHOWN]:
        yield _cut(key.removeprefix("modelspec."), 40), _cut(told[key], 120)
    if len(told) > SHOWN:
        yield "more", f"{len(told) - SHOWN} entries (see --json)"


def _hashes(hashes: Hashes, numbers: Numbers | None) -> Iterator[tuple[str, str]]:
    known = (("AutoV2", hashes.auto_v2), ("AutoV3", hashes.auto_v3), ("old", hashes.old_short))
    if short := ", ".join(f"{name} {value}" for name, value in known if value):
        yield "hashes", short if hashes.sha256 else f"{short} (more with --deep)"
    if hashes.sha256:
        yield "sha256", hashes.sha256
    for key, right in hashes.checks.items():
        yield key.removeprefix("modelspec."), "agrees with its numbers" if right else "DOES NOT AGREE with its numbers"
    if numbers:
        yield "not finite", f"{len(numbers.non_finite)}: {_some(numbers.non_finite)}" if numbers.non_finite else "none"
        if numbers.all_zero:
            yield "all zero", f"{len(numbers.all_zero)}: {_some(numbers.all_zero)}"


def _uses(report: FileReport) -> Iterator[tuple[str, str]]:
    if report.read_by:
        yield "read by", ", ".join(report.read_by)
    for caution in report.cautions:
        yield "but", caution


def _some(values: Iterable[str]) -> str:
    values = list(values)
    rest = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return f"{', '.join(values[:SHOWN])}{rest}"


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _size(size: int) -> str:
    """Bytes as people say them, in thousands."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."

"""The commands that mend what can be mended in a file, or make more of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ldm.weights.detect import CHECKPOINT
from ldm.weights.doctor.report import FileReport, Remedy

WIDE = ("F32", "F64")


def remedies(report: FileReport) -> tuple[Remedy, ...]:
    """What `ldm convert` can do for this file, the most urgent first."""
    return tuple(_remedies(report))


def _remedies(report: FileReport) -> Iterator[Remedy]:
    if report.pickle is not None and report.layout == "pickle":
        if report.pickle.readable and report.problem is None:
            yield Remedy("the same without a pickle's risk", _convert(report, "", "--allow-pickle"))
            if not report.parts:
                yield Remedy("all about its tensors", shlex.join(["ldm", "info", report.path, "--allow-pickle"]))
        return
    held = {part.name for part in report.parts}
    if report.kind == CHECKPOINT and "U-Net" in held and "autoencoder" not in held:
        yield Remedy("put an autoencoder in", _convert(report, "-whole", "--vae", "VAE.safetensors"))
    if report.problem or report.kind != CHECKPOINT:
        return
    if report.layout == "diffusers folder":
        yield Remedy("one file of it", _convert(report, "", "--to", "single"))
        return
    spare = sum(part.size for part in report.parts if part.name == "EMA weights")
    if spare:
        yield Remedy(f"{_share(spare, report)} smaller, without its EMA copies", _convert(report, "-pruned", "--prune"))
    wide = sum(part.size for part in report.parts if set(part.dtypes) & {*WIDE})
    if wide > report.size // 4:
        what = f"{_share(wide // 2, report)} smaller, in half precision"
        yield Remedy(what, _convert(report, "-fp16", "--dtype", "fp16"))


def _convert(report: FileReport, mark: str, *flags: str) -> str:
    """The command line. mark: what is put behind the name, so that nothing is written over."""
    path = Path(report.path)
    output = path.with_name(f"{path.name if path.is_dir() else path.stem}{mark}.safetensors")
    return shlex.join(["ldm", "convert", report.path, str(output), *flags])


def _share(size: int, report: FileReport) -> str:
    return f"{100 * size / max(1, report.size):.0f} %"

"""Ours against diffusers on one machine: the same tensors, the same inputs, timed in turns, and how exact each is.

Every part is measured against that side's own float32 result, so an error is what a faster arithmetic costs. Where
diffusers is not installed, or has no place for a model, ours is measured alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.evaluation import bench_diffusers, bench_ours
from ldm.evaluation.bench_inputs import PLAIN, Setting, Work
from ldm.evaluation.bench_process import Side, measure_fresh
from ldm.evaluation.turns import Contestant, Measured, error, in_turns, median_seconds, paired_ratio, psnr, timed
from ldm.models.presets import SystemConfig, sd1, sd2, sdxl
from ldm.pipeline.device import choose_device, choose_precision
from ldm.pipeline.latent_diffusion import LatentDiffusion
from ldm.pipeline.load import load, random_system, save_checkpoint
from ldm.weights.detect import detect
from ldm.weights.diffusers_write import write_folder
from ldm.weights.source import open_source

OurSide = Callable[[LatentDiffusion, Work], bench_ours.Run]
TheirSide = Callable[[Path, Setting, Work], bench_diffusers.Run]

Part = Literal["step", "decode", "text", "picture", "load", "memory", "tune"]
Preset = Literal["sd15", "sd21", "sdxl"]

PRESETS: Mapping[Preset, Callable[[], SystemConfig]] = {"sd15": sd1, "sd21": sd2, "sdxl": sdxl}

InProcess = Literal["step", "decode", "text", "picture"]

SIDES: Mapping[InProcess, tuple[OurSide, TheirSide]] = {
    "step": (bench_ours.step, bench_diffusers.step),
    "decode": (bench_ours.decode, bench_diffusers.decode),
    "text": (bench_ours.text, bench_diffusers.text),
    "picture": (bench_ours.picture, bench_diffusers.picture),
}
"""What each side does, of the parts that are timed in this process."""

PICTURES = ("decode", "picture")
"""The parts that give a picture, so that an error can be told in dB."""

COMPILED = ("step", "picture")
"""The parts that a compiled model does otherwise."""

BY_COMPILING = ", compiled"
"""How the settings of such an entry end."""

SIZELESS = ("text", "load")
"""The parts that are measured at one size: nothing, or hardly anything, in them depends on it."""

Clock = Callable[[], float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One line of the table. Times are medians in seconds; of "memory" all three are bytes at the peak.

    ratio, ratio_default: theirs over ours, of these medians; paired_ratio, paired_ratio_default: the medians of each
               round's ratio, which count where the machine had other work too
    settings:  what each of the three was, in words
    max_error, l2_error, psnr_db: against the same side's float32 result (largest difference, relative norm, dB)
    agreement: how far their float32 result is from ours, relative norm: whether both hold the same weights
    note:      why something is missing
    """

    part: Part
    size: int
    runs: int
    unit: Literal["s", "bytes"]
    ours: float
    theirs_best: float | None = None
    theirs_default: float | None = None
    ratio: float | None = None
    ratio_default: float | None = None
    paired_ratio: float | None = None
    paired_ratio_default: float | None = None
    settings: Mapping[str, str | None] | None = None
    max_error: float | None = None
    theirs_max_error: float | None = None
    l2_error: float | None = None
    theirs_l2_error: float | None = None
    psnr_db: float | None = None
    theirs_psnr_db: float | None = None
    agreement: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    model:   a file or folder, or a preset, whose weights are then random
    sizes:   sides in pixels; empty: the model's own; runs: timed ones, after one to warm up
    steps:   of whole pictures; alone: leave diffusers out; device: as `load` takes it
    compile: time our side with compiled blocks, of what is timed in this process
    """

    model: Path | Preset
    parts: tuple[Part, ...] = ("step", "decode", "text", "picture", "load", "memory")
    sizes: tuple[int, ...] = ()
    runs: int = 5
    steps: int = 4
    alone: bool = False
    device: str = "auto"
    compile: bool = False


@dataclass(frozen=True)
class Subject:
    """A model on disk: file, as `load` takes it; folder: the same for diffusers, or None and a note why not."""

    file: Path
    folder: Path | None
    config: SystemConfig
    device: str
    note: str | None = None


MeasureTuning = Callable[[Subject, int, int], Entry]
"""(a subject, a size, how many times) -> the line of the part "tune"."""


def bench(
    plan: Plan, say: Say = lambda _: None, clock: Clock = time.perf_counter, tuning: MeasureTuning | None = None
) -> Iterator[Entry]:
    """The lines of the table, each as soon as it is measured. say: told what is being done.

    tuning: what measures the part "tune" of a subject, at a size, so many times: `ldm.training` is above this folder.

    Weights that are random, and diffusers' copy of a model, lie in the folder for temporary files meanwhile. Raises
    LdmError for a plan that cannot be carried out.
    """
    if plan.runs < 1 or not 1 <= plan.steps <= 1000:
        raise LdmError(
            f"bench: found {plan.runs} runs of {plan.steps} steps, expected at least one run and 1..1000 steps"
        )
    if plan.compile and not any(part in COMPILED for part in plan.parts):
        raise LdmError(f"compile: acts on {' and '.join(COMPILED)}; ask for one of these parts, or leave it out")
    with _subject(plan, say) as subject:
        sizes = plan.sizes or (subject.config.size,)
        works = [bench_ours.work_for(subject.config, size, plan.steps, subject.device) for size in sizes]
        for part in plan.parts:
            for work in works[:1] if part in SIZELESS else works:
                say(f"{part}, {work.size} x {work.size}")
                match part:
                    case "memory":
                        yield _memory(subject, work)
                    case "load":
                        yield _load(subject, work, plan.runs)
                    case "tune":
                        if tuning is None:
                            raise LdmError("tune: nothing was given that measures it; leave the part out")
                        yield tuning(subject, work.size, plan.runs)
                    case "step" | "decode" | "text" | "picture":
                        yield _in_process(part, subject, work, plan, clock)


@contextmanager
def _subject(plan: Plan, say: Say) -> Iterator[Subject]:
    """The model's files, some of which are written for the occasion."""
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name:
        here = Path(name)
        if isinstance(plan.model, Path):
            file = plan.model
        else:
            say(f"random weights for {plan.model}")
            file = here / f"{plan.model}.safetensors"
            save_checkpoint(random_system(PRESETS[plan.model](), dtype=torch.float16), file)
        source = open_source(file)
        config, device = detect(source).config, str(choose_device(plan.device))
        folder, note = None, None
        if plan.alone:
            note = "diffusers was left out"
        elif bench_diffusers.installed() is None:
            note = "diffusers, or transformers, is not installed"
        else:
            say("the same weights for diffusers")
            try:
                write_folder(here / "diffusers", source, config)
                folder = here / "diffusers"
            except LdmError as failure:
                note = f"diffusers cannot hold this model: {failure}"
        yield Subject(file, folder, config, device, note)


def _in_process(part: InProcess, subject: Subject, work: Work, plan: Plan, clock: Clock) -> Entry:
    """A part that is timed in this process. A side holds the one network that it needs, theirs never two."""
    our_side, their_side = SIDES[part]
    runs, compiles = plan.runs, plan.compile and part in COMPILED

    def ours(dtype: str, *, compiles: bool = False) -> Contestant:
        model = load(subject.file, device=subject.device, dtype=dtype, offload="none")
        return timed(our_side(model.compiled() if compiles else model, work), clock)

    def theirs(setting: Setting) -> Contestant:
        assert subject.folder is not None
        return timed(their_side(subject.folder, setting, work), clock)

    exact = _output(ours("float32")())
    contestant, warm_up = ours("auto", compiles=compiles), None
    if compiles:
        first, second = contestant().seconds, contestant().seconds
        warm_up = f"{part} {work.size}: ours is compiled, which took {max(0.0, first - second):.1f} s"
    if subject.folder is None:
        measured = in_turns({"ours": contestant}, runs)["ours"]
        entry = Entry(part, work.size, runs, "s", median_seconds(measured), note=subject.note)
        entry = replace(entry, settings=_settings(subject, compiles=compiles), note=_joined(warm_up, subject.note))
        return _with_errors(entry, "", measured, exact)
    their_exact = _output(theirs(PLAIN)())
    tried = bench_diffusers.settings(subject.device)
    if part == "text":  # there is nothing in it that could be channels-last
        tried = tuple(setting for setting in tried if not setting.channels_last)
    played = play(contestant, theirs, tried, runs)
    entry = replace(_entry(part, subject, work, runs, played, compiles=compiles), note=warm_up)
    entry = _with_errors(entry, "", played.ours, exact)
    entry = _with_errors(entry, "theirs_", played.theirs_best, their_exact)
    return replace(entry, agreement=error(their_exact, exact).l2)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


@dataclass(frozen=True, eq=False)
class Match:
    """Runs of both sides in turns, ours against their best; and, where that is another one, against their default, of
    which theirs and the ratio are kept."""

    best: Setting
    default: Setting
    ours: list[Measured]
    theirs_best: list[Measured]
    theirs_default: list[Measured]
    paired_ratio: float
    paired_ratio_default: float


def play(ours: Contestant, theirs: Callable[[Setting], Contestant], tried: Sequence[Setting], runs: int) -> Match:
    """Find their fastest of some settings, the first of which is their default, and time it and that one against ours.

    A setting is tried by one run after one to warm up. In all this at most one of theirs is in memory.
    """
    trials = {setting: in_turns({"theirs": theirs(setting)}, 1)["theirs"] for setting in tried if len(tried) > 1}
    best = min(tried, key=lambda setting: median_seconds(trials[setting]) if trials else 0.0)
    against_best = in_turns({"ours": ours, "theirs": theirs(best)}, runs)
    ours_best, theirs_best = against_best["ours"], against_best["theirs"]
    paired = paired_ratio(ours_best, theirs_best)
    if best == tried[0]:
        return Match(best, best, ours_best, theirs_best, theirs_best, paired, paired)
    against_default = in_turns({"ours": ours, "theirs": theirs(tried[0])}, runs)
    theirs_default = against_default["theirs"]
    paired_default = paired_ratio(against_default["ours"], theirs_default)
    return Match(best, tried[0], ours_best, theirs_best, theirs_default, paired, paired_default)


def _entry(part: Part, subject: Subject, work: Work, runs: int, played: Match, *, compiles: bool = False) -> Entry:
    ours, best, default = map(median_seconds, (played.ours, played.theirs_best, played.theirs_default))
    return Entry(
        part, work.size, runs, "s", ours, best, default, best / ours, default / ours, played.paired_ratio,
        played.paired_ratio_default, settings=_settings(subject, played.best, played.default, compiles=compiles),
    )  # fmt: skip


def _settings(
    subject: Subject, best: Setting | None = None, default: Setting | None = None, *, compiles: bool = False
) -> dict[str, str | None]:
    precision = choose_precision("auto", torch.device(subject.device), subject.config.family)
    theirs = {"theirs_best": best, "theirs_default": default}
    ours = f"{precision}{BY_COMPILING}" if compiles else str(precision)
    return {"ours": ours, **{name: None if one is None else str(one) for name, one in theirs.items()}}


def _with_errors(entry: Entry, side: Literal["", "theirs_"], measured: Sequence[Measured], exact: Tensor) -> Entry:
    output = _output(measured[-1])
    far = error(output, exact)
    decibels = psnr(output, exact) if entry.part in PICTURES else None
    return replace(entry, **{f"{side}max_error": far.max, f"{side}l2_error": far.l2, f"{side}psnr_db": decibels})


def _output(measured: Measured) -> Tensor:
    assert measured.output is not None
    return measured.output


def _load(subject: Subject, work: Work, runs: int) -> Entry:
    """From the start of a process to the end of its first step, less a warm step."""
    ours = partial(measure_fresh, "bench_ours", "step", subject.file, subject.folder, work)
    note = subject.note
    if subject.folder is not None:
        theirs = partial(measure_fresh, "bench_diffusers", "step", subject.file, subject.folder, work)
        tried = tuple(setting for setting in bench_diffusers.settings(subject.device) if not setting.channels_last)
        try:
            played = play(ours, lambda setting: partial(theirs, setting), tried, runs)
            return _entry("load", subject, work, runs, played)
        except LdmError as failure:
            note = str(failure)
    seconds = median_seconds(in_turns({"ours": ours}, runs)["ours"])
    return Entry("load", work.size, runs, "s", seconds, settings=_settings(subject), note=note)


def _memory(subject: Subject, work: Work) -> Entry:
    """The peak of a process that loads and draws a picture; once, for it hardly varies. Their best is their leanest."""

    def peak(side: Side, setting: Setting = PLAIN) -> int:
        found = measure_fresh(side, "picture", subject.file, subject.folder, work, setting).peak
        if found is None:
            raise LdmError("memory: this system does not tell a process's peak; leave the part out")
        return found

    alone = Entry("memory", work.size, 1, "bytes", peak("bench_ours"), settings=_settings(subject), note=subject.note)
    if subject.folder is None:
        return alone
    tried = bench_diffusers.settings(subject.device)
    default, lean = tried[0], Setting(tried[-1].dtype, frugal=True)
    try:
        best, plain = peak("bench_diffusers", lean), peak("bench_diffusers", default)
    except LdmError as failure:
        return replace(alone, note=str(failure))
    return replace(
        alone, theirs_best=best, theirs_default=plain, ratio=best / alone.ours, ratio_default=plain / alone.ours,
        settings=_settings(subject, lean, default),
    )  # fmt: skip

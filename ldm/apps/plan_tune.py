"""`ldm plan --tune`: what tuning will take of memory, phase by phase, and what would take less."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.flags.requests import size_of
from ldm.apps.plan import Other, as_json, bytes_of, device_of, model_of, page
from ldm.errors import LdmError
from ldm.pipeline.device import available_memory, choose_precision
from ldm.pipeline.plan import Work, peak
from ldm.training.adapter_options import AdapterOptions
from ldm.training.engine.loop_config import LoopConfig
from ldm.training.engine.optimizers import PACKAGES
from ldm.training.engine.precision import precision_on
from ldm.training.tune.memory import TuneWork, caption_bytes, plan_tuning
from ldm.training.tune.settings import Tuning, check_base, usual_batch
from ldm.training.tune.trained import base_dtype

if TYPE_CHECKING:
    from ldm.apps.flags.commands import Plan

DRAWING_ALONE = ("guidance", "image", "lora", "controls", "vae_tile", "offload", "store", "dtype")
"""Flags that a plan for tuning does not heed."""

WORTH_NAMING = 0.97
"""Another way is listed where it takes at most this share."""


def plan_tune(command: Plan) -> None:
    """Print what tuning would take. Raises LdmError for what cannot be."""
    work, name = work_of(command)
    budget = None if command.budget is None else bytes_of(command.budget)
    phases = plan_tuning(work)
    planned = [(other, peak(plan_tuning(other.work))) for other in others_than(work)]
    others = [(other, takes) for other, takes in planned if takes <= WORTH_NAMING * peak(phases)]
    room = available_memory(work.drawn.device) if budget is None else budget
    if command.json:
        print(json.dumps(as_json(_facts(work, name), phases, others, room), indent=2))
        return
    print("\n".join(page(_title(work, name), phases, others, room, "free" if budget is None else "allowed")))
    print(f"not counted: {_not_counted(work)}")


def work_of(command: Plan) -> tuple[TuneWork, str]:
    """The flags as a piece of work, and the model's name. Raises LdmError for values that cannot be."""
    assert command.tune is not None
    usual = {field.name: field.default for field in fields(command)}
    for flag in DRAWING_ALONE:
        if getattr(command, flag) != usual[flag]:
            raise LdmError(
                f"{flag.replace('_', '-')}: found with a plan for tuning, which has no such flag; leave it away"
            )
    asked, device = command.tuning, device_of(command.device)
    name, config, tensors = model_of(command)
    tuning = Tuning(
        Path(),
        Path(),
        method=command.tune,
        adapter=AdapterOptions(asked.kind, asked.rank),
        whole=asked.whole,
        text=asked.text,
        canny=command.tune == "controlnet",
        checkpointing=asked.checkpointing,
    )
    check_base(tuning, config)
    if not tuning.by_adapter and (asked.kind, asked.rank) != ("lora", 16):
        raise LdmError(f"kind and rank: found with {command.tune}, expected a LoRA; leave them away")
    if tuning.by_adapter and find_spec("peft") is None:
        raise LdmError("plan: a LoRA needs peft, a package that is not installed; pip install 'ldm[tune]'")
    batch = usual_batch(config) if command.batch is None else command.batch
    if batch < 1:
        raise LdmError(f"batch: found {batch}, expected 1 or more")
    width, height = size_of("size", command.size) or (config.size, config.size)
    precision = precision_on(device, asked.precision)
    parts = choose_precision(base_dtype(tuning, device, precision), device, config.family)
    loop = LoopConfig(
        steps=1, batch=batch, rate=1e-4, optimizer=asked.optimizer, accumulate=asked.accumulate, precision=precision,
        workers=asked.workers,
    )  # fmt: skip
    return TuneWork(Work(config, tensors, device, parts, width, height), tuning, loop, asked.shuffle), name


def others_than(work: TuneWork) -> Iterator[Other[TuneWork]]:
    """What this program can do to hold less, the one that costs least first."""
    drawn, tuning, loop = work.drawn, work.tuning, work.loop
    if not tuning.checkpointing:
        cost = "the same result; steps take about a third longer"
        yield Other("--checkpointing", cost, replace(work, tuning=replace(tuning, checkpointing=True)))
    if loop.batch > 1:
        less = replace(loop, batch=1, accumulate=loop.accumulate * loop.batch)
        cost = "the same steps; they take longer"
        yield Other(f"--batch 1 --accumulate {less.accumulate}", cost, replace(work, loop=less))
    for optimizer, cost in (
        ("adamw8bit", "moments of a byte"),
        ("adafactor", "rows and columns for moments; other steps"),
    ):
        if optimizer != loop.optimizer and find_spec(PACKAGES[optimizer]) is not None:
            yield Other(f"--optimizer {optimizer}", cost, replace(work, loop=replace(loop, optimizer=optimizer)))
    if loop.precision == "no":
        cost = "rounding to 8 bits; slower on a CPU without bfloat16"
        parts = choose_precision(base_dtype(tuning, drawn.device, "bf16"), drawn.device, drawn.config.family)
        lowered = replace(work, drawn=replace(drawn, precision=parts), loop=replace(loop, precision="bf16"))
        yield Other("--precision bf16", cost, lowered)
    if tuning.text:
        cost = "words mean what they meant"
        yield Other("without --text", cost, replace(work, tuning=replace(tuning, text=False)))
    if tuning.method == "full" or tuning.whole:
        flag = "--tune lora" if tuning.method == "full" else "without --whole"
        small = replace(tuning, method="lora" if tuning.method == "full" else tuning.method, whole=False)
        parts = choose_precision(base_dtype(small, drawn.device, loop.precision), drawn.device, drawn.config.family)
        cost = "a LoRA, which learns less, and is a small file"
        yield Other(flag, cost, replace(work, drawn=replace(drawn, precision=parts), tuning=small))
    if tuning.by_adapter and tuning.adapter.rank > 4:
        fewer = replace(tuning, adapter=replace(tuning.adapter, rank=4))
        yield Other("--rank 4", "a smaller file, which learns less", replace(work, tuning=fewer))
    width, height = (max(64, side * 3 // 4 // 64 * 64) for side in (drawn.width, drawn.height))
    if width < drawn.width or height < drawn.height:
        smaller = replace(drawn, width=width, height=height)
        yield Other(f"--size {width}x{height}", "smaller pictures, sooner", replace(work, drawn=smaller))


def _title(work: TuneWork, name: str) -> str:
    drawn, loop = work.drawn, work.loop
    pictures = "a picture" if loop.batch == 1 else f"{loop.batch} pictures at once"
    size = f"{drawn.width}x{drawn.height}"
    return (
        f"{name}: tuning by {work.tuning.method}, {pictures} of {size} on {drawn.device} "
        f"({loop.optimizer}, precision {loop.precision})"
    )


def _facts(work: TuneWork, name: str) -> dict[str, object]:
    drawn, loop = work.drawn, work.loop
    return {
        "model": name,
        "tune": work.tuning.method,
        "device": str(drawn.device),
        "precision": loop.precision,
        "width": drawn.width,
        "height": drawn.height,
        "batch": loop.batch,
        "accumulate": loop.accumulate,
        "optimizer": loop.optimizer,
        "checkpointing": work.tuning.checkpointing,
        "not_counted": _not_counted(work),
    }


def _not_counted(work: TuneWork) -> str:
    """What the process or the GPU holds besides."""
    if work.drawn.device.type != "cpu":
        return "CUDA's own memory, room that its kernels take while they run, gaps, and the machine's memory"
    each = f"{caption_bytes(work) / 2**20:.1f} MiB for each caption, " if caption_bytes(work) else ""
    return f"Python and its libraries, about 0.8 GiB, {each}and the report at the end"

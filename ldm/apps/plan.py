"""`ldm plan`: what a run will take of memory, phase by phase, and what would take less."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from ldm.apps.flags.requests import size_of
from ldm.errors import LdmError
from ldm.models import presets
from ldm.models.offloading import OFFLOADS, check_offload
from ldm.pipeline.device import available_memory, choose_device, choose_precision
from ldm.pipeline.first_stage import TILE
from ldm.pipeline.load import SHIPPED, shipped_model
from ldm.pipeline.plan import Phase, Work, peak, plan_drawing, tensors_of
from ldm.pipeline.request import MAX_CONTROLS, GenerateRequest
from ldm.pipeline.sample import batch_size
from ldm.weights.detect import detect
from ldm.weights.find import locate, model_roots
from ldm.weights.io import printable
from ldm.weights.part import is_part, rest_path, with_rest
from ldm.weights.source import open_source

if TYPE_CHECKING:
    from ldm.apps.flags.commands import Plan
    from ldm.models.presets import SystemConfig
    from ldm.weights.io import TensorInfo

OFFLOAD_COSTS = {
    "parts": "the same picture; each network is copied to the GPU for each batch",
    "blocks": "the same picture; the U-Net's weights are copied to the GPU at every step",
}

LAYOUTS = {"sd15": presets.sd1, "sd21": presets.sd2, "sdxl": presets.sdxl}

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


SomeWork = TypeVar("SomeWork")


@dataclass(frozen=True)
class Other(Generic[SomeWork]):
    """Another way to do as much: the flag that asks for it, and what it costs."""

    flag: str
    cost: str
    work: SomeWork


def plan(command: Plan) -> None:
    """Print what drawing would take. Raises LdmError for what cannot be."""
    check_flags(command.tuning, "drawing", "--tune METHOD beside it")
    work, name = work_of(command)
    budget = None if command.budget is None else bytes_of(command.budget)
    phases = plan_drawing(work)
    others = [(other, peak(plan_drawing(other.work))) for other in others_than(work)]
    room = available_memory(work.device) if budget is None else budget
    if command.json:
        print(json.dumps(as_json(_facts(work, name), phases, others, room), indent=2))
    else:
        named = "free" if budget is None else "allowed"
        print("\n".join(page(_title(work, name), phases, others, room, named)))


def work_of(command: Plan) -> tuple[Work, str]:
    """The flags as a piece of work, and the model's name. Raises LdmError for values that cannot be."""
    device = device_of(command.device)
    check_offload(command.offload, device)
    if not 0 <= command.controls <= MAX_CONTROLS:
        raise LdmError(f"controls: found {command.controls}, expected how many ControlNets, 0 to {MAX_CONTROLS}")
    name, config, tensors = model_of(command)
    width, height = size_of("size", command.size) or (config.size, config.size)
    request = GenerateRequest(
        prompt="", width=width, height=height, count=1 if command.batch is None else command.batch
    )
    work = Work(
        config,
        tensors,
        device,
        choose_precision(command.dtype, device, config.family),
        width,
        height,
        batch=min(request.count, batch_size(request)),
        guided=command.guidance != 1,
        from_picture=command.image,
        adapted=command.lora,
        controls=command.controls,
        vae_tile=command.vae_tile,
        offload=command.offload,
        store=command.store,
    )
    return work, name


def model_of(command: Plan) -> tuple[str, SystemConfig, Mapping[str, TensorInfo]]:
    """The model's name, what it is, and the tensors of its file. Raises LdmError where there is no such file."""
    if command.preset is not None and command.file is not None:
        raise LdmError("model: found both --model and --preset, expected one of them")
    if command.preset is not None:
        config = LAYOUTS[command.preset]()
        return command.preset, config, tensors_of(config)
    path = locate("checkpoint", command.file or shipped_model(), model_roots(None))
    source = open_source(path, allow_pickle=command.allow_pickle)
    if is_part(source):
        source = with_rest(source, open_source(rest_path(source, SHIPPED)))
    return printable(path.name), detect(source).config, source.tensors


def device_of(name: str) -> torch.device:
    """The device that is meant, which may be a GPU that this machine has not: for that too it can be planned."""
    if name == "cuda" and not torch.cuda.is_available():
        return torch.device(name)
    return choose_device(name)


def bytes_of(text: str) -> int:
    """ "6GB" -> 6 * 10**9, "6GiB" -> 6 * 2**30. Raises LdmError for what is no size."""
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([a-z]{0,3})\s*", text.lower())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise LdmError(f"budget: found {printable(text)}, expected an amount of memory, as 6GB")
    return int(float(found[1]) * UNITS[found[2]])


def others_than(work: Work) -> Iterator[Other[Work]]:
    """What this program can do to hold less, the one that costs least first."""
    half = torch.bfloat16 if work.device.type == "cpu" else torch.float16
    if work.precision.unet is torch.float32:
        precision = choose_precision(half, work.device, work.config.family)
        cost = f"rounding to {'8' if half is torch.bfloat16 else '11'} bits; slower on a CPU without bfloat16"
        yield Other(f"--dtype {str(half).removeprefix('torch.')}", cost, replace(work, precision=precision))
    if work.batch > 1:
        yield Other("--count 1", "pictures one after another, which takes a little longer", replace(work, batch=1))
    gpu = work.device.type != "cpu"
    if work.store == "full":
        cost = "pictures change a little; steps take longer"
        yield Other("--store int8", cost, replace(work, store="int8"))
    for offload in OFFLOADS[OFFLOADS.index(work.offload) + 1 :] if work.device.type == "cuda" else ():
        yield Other(f"--offload {offload}", OFFLOAD_COSTS[offload], replace(work, offload=offload))
    # On a GPU, where tiles hold still less, what waits beside it would be counted with it.
    if work.vae_tile is None and not gpu and max(work.width, work.height) > TILE:
        cost = "the same picture; decoding takes a little longer"
        yield Other(f"--vae-tile {TILE}", cost, replace(work, vae_tile=TILE))
    if work.guided:
        cost = "half the time; pictures that follow the prompt less"
        yield Other("--guidance 1", cost, replace(work, guided=False))
    width, height = (max(64, side * 3 // 4 // 64 * 64) for side in (work.width, work.height))
    if width < work.width or height < work.height:
        smaller = replace(work, width=width, height=height)
        yield Other(f"--size {width}x{height}", "smaller pictures, sooner", smaller)


def page(
    title: str, phases: Sequence[Phase], others: Sequence[tuple[Other[SomeWork], int]], room: int | None, named: str
) -> Iterator[str]:
    """The plan in words. others: with what each takes; room: bytes that are there, and what they are called."""
    most = peak(phases)
    yield title
    for phase in phases:
        yield f"  {phase.name:<8} {gib(phase.peak)}{'  <- the most' if phase.peak == most else ''}"
    if room is not None:
        yield f"{'fits' if most <= room else 'does not fit'}: {gib(room).strip()} {named}"
    if others:
        yield "less with"
    wide = max([18, *(len(other.flag) for other, _ in others)])
    for other, takes in others:
        fits = ", which fits" if room is not None and takes <= room < most else ""
        yield f"  {other.flag:<{wide}} {gib(takes)}{fits}: {other.cost}"


def as_json(
    facts: Mapping[str, object],
    phases: Sequence[Phase],
    others: Sequence[tuple[Other[SomeWork], int]],
    room: int | None,
) -> dict[str, object]:
    """The plan for programs, in bytes. facts: what is planned."""
    most = peak(phases)
    return {
        **facts,
        "phases": {phase.name: phase.peak for phase in phases},
        "peak": most,
        "room": room,
        "fits": None if room is None else most <= room,
        "others": [
            {"flag": o.flag, "cost": o.cost, "peak": takes, "fits": None if room is None else takes <= room}
            for o, takes in others
        ],
    }


def _title(work: Work, name: str) -> str:
    pictures = "a picture" if work.batch == 1 else f"{work.batch} pictures at once"
    return f"{name}: {pictures} of {work.width}x{work.height} on {work.device} ({work.precision})"


def _facts(work: Work, name: str) -> dict[str, object]:
    return {
        "model": name,
        "device": str(work.device),
        "precision": str(work.precision),
        "width": work.width,
        "height": work.height,
        "batch": work.batch,
    }


def check_flags(group: object, what: str, expected: str) -> None:
    """Raise LdmError for a flag of a group that is given, and would do nothing."""
    for field in fields(group):  # pyright: ignore[reportArgumentType]
        if getattr(group, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise LdmError(f"{name}: found with a plan for {what}, expected {expected}; leave it away")


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:6.2f} GiB"

"""`ldm convert`: a model in, the same model out, in another layout, precision or mixture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm.apps.flags.adapters import read_adapters
from ldm.apps.flags.commands import Convert
from ldm.errors import LdmError
from ldm.models.presets import SystemConfig
from ldm.pipeline.load import PREFIXES, PartKind
from ldm.weights.adapters.apply import Use, plan
from ldm.weights.architecture import autoencoder_config, under, unet_config
from ldm.weights.config_json import CONFIG_KEY, config_from_json, config_to_json
from ldm.weights.controlnet import DIFFERENCE, config_of, control_source
from ldm.weights.controlnet import PREFIX as CONTROL
from ldm.weights.detect import CHECKPOINT, detect, kind_of
from ldm.weights.diffusers import DROPPED_METADATA
from ldm.weights.diffusers_write import write_component, write_controlnet, write_folder
from ldm.weights.doctor.kinds import CONTROLNET
from ldm.weights.find import Kind, locate, model_roots
from ldm.weights.hashes import MODELSPEC_HASH, OWN_HASHES, full_hashes
from ldm.weights.io import PICKLE_SUFFIXES, printable, read_header
from ldm.weights.layout import FIRST_STAGE, UNET, build, compare, not_needed_as
from ldm.weights.merge import (
    EMA,
    FIRST_CONVOLUTION,
    add_difference,
    baked,
    extended,
    kept,
    unpaired,
    weighted,
    with_ema,
    without_ema,
)
from ldm.weights.prediction import Decision, decide
from ldm.weights.save import modelspec, write_stream
from ldm.weights.source import SCALE_KEY, Source, open_source, renamed_source, with_part

DTYPES = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARKS = "training marks"
"""What tensors are called by `not_needed_as` that tell other programs how to use the model: they outlive pruning."""
NO_PLACE = "no place for it"
"""What tensors are called that no other word is known for."""
SHOWN = 40
"""How many of their names are listed on the terminal; JSON has all of every kind."""


@dataclass(frozen=True)
class Written:
    """What was written. left_out: names that FILE has and OUT has not, by what they are."""

    path: Path
    layout: str
    what: str
    files: Mapping[str, str]
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()


def convert(command: Convert) -> None:
    """Write the model and say what became of it. Raises LdmError where that cannot be done; then nothing is written."""
    report = converted(command)
    if command.json:
        print(json.dumps({**vars(report), "path": str(report.path), "bytes": _size(report.path)}))
        return
    print(f"{printable(str(report.path))}: {report.layout}, {report.what}, {_size(report.path) / 1e6:,.1f} MB")
    for name, digest in report.files.items():
        print(f"  {printable(name)}: verified, numbers have SHA-256 {digest}")
    for note in report.notes:
        print(f"  note: {note}")
    for kind, names in report.left_out.items():
        shown = names[:SHOWN] if kind == NO_PLACE else ()  # the others were meant to go: their number will do
        print(f"  left out, {kind} ({len(names)})" + (":" if shown else ""))
        print("".join(f"    {printable(name)}\n" for name in shown), end="")
        if shown and len(names) > SHOWN:
            print(f"    and {len(names) - SHOWN} more, which --json lists")


def converted(command: Convert) -> Written:
    """Do it: a chain of sources, of which each tensor is computed when it is written."""
    to = _layout(command)
    whole, parts = _opened(command, "checkpoint", command.file), _parts(command)
    source = _with_parts(whole, parts)
    if kind_of(source.tensors) != CHECKPOINT:
        return _convert_part(command, source, to)
    own = (CONFIG_KEY, SCALE_KEY, *DROPPED_METADATA)
    metadata, notes = {key: value for key, value in source.metadata.items() if key not in own}, []
    source = _with_ema_choice(command, whole)
    if command.merge is not None:
        source, metadata["modelspec.merged_from"], notes = _merged(command, source, command.merge, parts)
    source = _with_parts(source, parts)  # whole, as they are asked for: a merge leaves them alone
    detection = detect(source, None if command.prediction == "auto" else command.prediction)
    config = detection.config
    _check_fit(source, config)
    if command.lora:
        adapters = read_adapters(command.lora, command.models, allow_pickle=command.allow_pickle)
        uses = [Use(*choice) for choice in adapters]
        source = baked(source, plan(config, source.shapes, uses))
        metadata["modelspec.merged_from"] = ", ".join(
            [metadata.get("modelspec.merged_from", _name(command.file)), *(use.adapter.name for use in uses)]
        )
    if command.prune:
        source = _pruned(source, config)
    title = metadata.get("modelspec.title") or _name(command.output)
    metadata |= modelspec(config, title)
    if to == "diffusers":
        left = write_folder(command.output, source, config, dtype=DTYPES[command.dtype], metadata=metadata)
        gone = {*left, *(whole.tensors.keys() - source.tensors.keys())}
    else:
        source = _marked(source, config)
        metadata[CONFIG_KEY] = config_to_json(config)
        write_stream(command.output, source.tensors, source.read, metadata, DTYPES[command.dtype])
        gone = whole.tensors.keys() - source.tensors.keys()
    what = f"{config.family}, {detection.variant}, predicts {config.prediction} ({detection.prediction_rule})"
    layout = "diffusers folder" if to == "diffusers" else "single file"
    averaged = ("the U-Net's tensors are its EMA copies",) if command.ema == "use" else ()
    notes = (*detection.warnings, *averaged, *notes)
    return Written(command.output, layout, what, _verify(command.output), _by_kind(gone), notes)


def _layout(command: Convert) -> str:
    """What to write, once nothing is in the way."""
    suffix = command.output.suffix.lower()
    named = "single" if suffix == ".safetensors" else "diffusers"
    to = named if command.to == "auto" else command.to
    shown = printable(str(command.output))
    if suffix in PICKLE_SUFFIXES or (to == "single" and named != "single"):
        raise LdmError(f"{shown}: a single file's name must end in .safetensors; no other kind of file is written")
    if command.output.exists() or command.output.is_symlink():
        raise LdmError(f"{shown}: exists already, and nothing is overwritten; give another name, or move it away")
    if command.minus is not None and command.merge is None:
        raise LdmError("--minus: expected --merge FILE too, the model whose difference is added")
    if command.weight is not None and (command.merge is None or not math.isfinite(command.weight)):
        raise LdmError("--weight: expected a finite number, with --merge FILE")
    return to


def _opened(command: Convert, kind: Kind, given: str | Path) -> Source:
    """A file that is named by its path or its name."""
    return open_source(locate(kind, given, model_roots(command.models or None)), allow_pickle=command.allow_pickle)


def _parts(command: Convert) -> list[tuple[str, Source]]:
    """The parts to put in: the prefix of each, and where it comes from."""
    given: list[tuple[PartKind, str | None]] = [("unet", command.unet), ("vae", command.vae)]
    given.extend(("text encoder", tower) for tower in command.text_encoder)
    return [(PREFIXES[kind], _opened(command, kind, path)) for kind, path in given if path is not None]


def _with_parts(source: Source, parts: Iterable[tuple[str, Source]]) -> Source:
    for prefix, part in parts:
        source = with_part(source, prefix, part)
    return source


def _with_ema_choice(command: Convert, source: Source) -> Source:
    if command.ema == "use":
        return with_ema(source)
    stale = command.prune or command.merge is not None or command.unet is not None or bool(command.lora)
    return without_ema(source) if command.ema == "drop" or (command.ema == "auto" and stale) else source


def _merged(
    command: Convert, first: Source, merge: Path, parts: list[tuple[str, Source]]
) -> tuple[Source, str, list[str]]:
    """The mixture, the names of what is in it, and a word on tensors that are in one file alone."""
    given = [merge] if command.minus is None else [merge, command.minus]
    others = [_opened(command, "checkpoint", path) for path in given]
    if command.minus is None:
        source = weighted(first, others[0], 0.5 if command.weight is None else command.weight)
    else:
        source = add_difference(first, others[0], others[1], 1.0 if command.weight is None else command.weight)
    if command.prediction == "auto" and command.unet is None:
        _check_predictions(_with_parts(first, parts), others)
    notes = []
    for path, other in zip(given, others, strict=True):
        if left := unpaired(other, first):
            notes.append(f"{_told(path)}: {len(left)} tensors are left out, for {_told(command.file)} has none of them")
        if alone := unpaired(first, other):
            notes.append(f"{_told(path)}: lacks {len(alone)} tensors, which stay as {_told(command.file)} has them")
    return source, ", ".join(map(_name, (command.file, *given))), notes


def _check_predictions(first: Source, others: Iterable[Source]) -> None:
    """Raise LdmError where the U-Nets predict different things: a mixture of them predicts nothing."""
    detection = detect(first)
    ours = detection.config.prediction
    for other in others:
        theirs = _decision(other, detection.config)
        if theirs is not None and theirs.prediction != ours:
            raise LdmError(
                f"{_told(first.path)} predicts {ours} ({detection.prediction_rule}), {_told(other.path)} predicts "
                f"{theirs.prediction} ({theirs.rule}): merge models that predict the same, or give --prediction"
            )


def _decision(source: Source, like: SystemConfig) -> Decision | None:
    """What the U-Net of a file predicts, which may hold no more of a system like this one."""
    if CONFIG_KEY in source.metadata:
        return Decision(config_from_json(source.metadata[CONFIG_KEY]).prediction, f"its own {CONFIG_KEY}")
    if FIRST_CONVOLUTION not in source.tensors:
        return None
    channels = source.tensors[FIRST_CONVOLUTION].shape[1]  # the one thing in which models that are merged may differ
    return decide(source, replace(like, unet=replace(like.unet, in_channels=channels)))


def _told(path: Path) -> str:
    return printable(str(path))


def _check_fit(source: Source, config: SystemConfig) -> None:
    """Raise LdmError where a network could not be filled, so that no broken model is written."""
    comparison = compare(source.tensors, build(config))
    if comparison.fits:
        return
    wrong = [f"{name} is missing" for name in comparison.missing] + list(comparison.misshapen)
    wrong += [f"{name} belongs to no network" for name in comparison.unexpected]
    raise LdmError(f"{printable(str(source.path))}: {len(wrong)} tensors do not fit, the first: {printable(wrong[0])}")


def _pruned(source: Source, config: SystemConfig) -> Source:
    """What networks need, marks for other programs, and EMA copies that are still there since they were asked for."""
    networks = tuple(build(config).by_prefix())

    def is_wanted(name: str) -> bool:
        kind = not_needed_as(name)
        return kind == MARKS or name.startswith(EMA) or (kind is None and name.startswith(networks))

    return kept(source, is_wanted)


def _marked(source: Source, config: SystemConfig) -> Source:
    """SDXL models that predict v carry empty tensors that tell other programs so."""
    if config.family != "sdxl" or config.prediction != "v":
        return source
    marks = ["v_pred", *(["ztsnr"] if config.zero_terminal_snr else [])]
    return extended(source, {mark: torch.zeros(0) for mark in marks if mark not in source.tensors})


def _convert_part(command: Convert, source: Source, to: str) -> Written:
    """What is no whole checkpoint: a U-Net or an autoencoder alone, an adapter, an embedding."""
    kind, dtype = kind_of(source.tensors), DTYPES[command.dtype]
    asked = {"--merge": command.merge, "--lora": command.lora, "--ema": command.ema == "use", "--prune": command.prune}
    if flag := next((flag for flag, value in asked.items() if value), None):
        raise LdmError(f"{printable(str(command.file))}: is {kind}; {flag} needs a whole checkpoint")
    if kind == CONTROLNET:
        return _convert_controlnet(command, source, to)
    prefix = next((p for p in (UNET, FIRST_STAGE) if all(name.startswith(p) for name in source.tensors)), None)
    if to == "single":
        bare = source if prefix is None else _bare(source, prefix)
        metadata = {key: value for key, value in source.metadata.items() if key not in OWN_HASHES}
        if prefix == FIRST_STAGE and "scale_factor" in source.facts:
            metadata[SCALE_KEY] = source.facts["scale_factor"]
        write_stream(command.output, bare.tensors, bare.read, metadata, dtype)
        return Written(command.output, "single file", kind, _verify(command.output), {})
    if prefix is None:
        raise LdmError(f"{printable(str(command.file))}: is {kind}; diffusers folders are written of checkpoints only")
    shapes, notes = under(source.shapes, prefix), ()
    if prefix == UNET:
        config: Any = unet_config(shapes)
    else:
        config, notes = _scaled(autoencoder_config(shapes), source)
    left = write_component(command.output, source, prefix, config, dtype=dtype)
    return Written(command.output, "diffusers folder", kind, _verify(command.output), _by_kind(left), notes)


def _convert_controlnet(command: Convert, source: Source, to: str) -> Written:
    """Without the base model that some files have beside it."""
    control, dtype = control_source(source), DTYPES[command.dtype]
    marked = any(name.startswith(CONTROL) for name in source.tensors)
    left = _by_kind(name for name in source.tensors if marked and not name.startswith(CONTROL) and name != DIFFERENCE)
    if to == "single":
        named = renamed_source(control, {f"{CONTROL}{name}": name for name in control.tensors})
        metadata = {key: value for key, value in source.metadata.items() if key not in DROPPED_METADATA}
        write_stream(command.output, named.tensors, named.read, metadata, dtype)
        return Written(command.output, "single file", CONTROLNET, _verify(command.output), left)
    if DIFFERENCE in control.tensors:
        raise LdmError(f"{printable(str(command.file))}: holds differences to a U-Net, which diffusers does not read")
    write_controlnet(command.output, control, config_of(control), dtype=dtype)
    return Written(command.output, "diffusers folder", CONTROLNET, _verify(command.output), left)


def _bare(source: Source, prefix: str) -> Source:
    """Without the prefix, as other programs expect of a network alone."""
    return renamed_source(source, {name.removeprefix(prefix): name for name in source.tensors})


def _scaled(config: Any, source: Source) -> tuple[Any, tuple[str, ...]]:
    """An autoencoder's config with its latents' scale, which stands in no tensor, and a word where it is a guess."""
    if "scale_factor" in source.facts:
        return replace(config, scale_factor=float(source.facts["scale_factor"])), ()
    note = f"scaling_factor {config.scale_factor} is a guess, right for SD 1.x and 2.x; SDXL has 0.13025"
    return config, (note,)


def _verify(path: Path) -> dict[str, str]:
    """Read what was written and compare its hash with what its header says: file -> hash of its numbers."""
    found = {}
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        header = read_header(file)
        digest = full_hashes(header).numbers
        if header.metadata[MODELSPEC_HASH] != f"0x{digest}":
            raise LdmError(f"{printable(str(file))}: reads back with other numbers than were written; check the disk")
        found[str(file.relative_to(path)) if path.is_dir() else file.name] = digest
    return found


def _by_kind(names: Any) -> dict[str, tuple[str, ...]]:
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kind = not_needed_as(name) or NO_PLACE
        kinds.setdefault("EMA copies" if name.startswith(EMA) else kind, []).append(name)
    return {kind: tuple(names) for kind, names in kinds.items()}


def _name(path: Path) -> str:
    """What a model is called in metadata."""
    return path.stem if path.suffix.lower() == ".safetensors" else path.name


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )

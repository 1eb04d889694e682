"""`--lora FILE[:WEIGHT[:WEIGHT]]` and `<lora:NAME:WEIGHT>`: adapters as they are named on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ldm.apps.output.progress import to_stderr
from ldm.errors import LdmError
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.text.prompt import adapters_in
from ldm.weights.adapters.read import Adapter, read_adapter
from ldm.weights.find import MODELS_VARIABLE, find, locate, model_roots
from ldm.weights.io import printable


@dataclass(frozen=True)
class Wanted:
    """An adapter's file, with its weights for the U-Net and for the text towers."""

    path: Path
    unet: float
    text: float


def read_adapters(
    given: Iterable[str], models: Sequence[Path] = (), *, allow_pickle: bool = False
) -> list[tuple[Adapter, float, float]]:
    """Each adapter with its weights for the U-Net and for the text towers. Raises LdmError for one that is not there.

    models: folders in which names are looked for; none: those of LDM_MODELS
    """
    wanted = wanted_by_flags(given, models)
    return choices(wanted, read_files(wanted, allow_pickle=allow_pickle))


def wanted_by_flags(given: Iterable[str], models: Sequence[Path] = ()) -> tuple[Wanted, ...]:
    """What --lora asks for: paths, or names in `models`."""
    roots = model_roots(models or None)
    parts = [split_weights(text) for text in given]
    return tuple(Wanted(locate("lora", name, roots), unet, tower) for name, unet, tower in parts)


def wanted_by_prompt(request: GenerateRequest, models: Sequence[Path] = ()) -> tuple[Wanted, ...]:
    """What a prompt's <lora:NAME:WEIGHT> ask for. NAME is a file's name in `models` and never a path, as prompts come
    from anywhere. Raises LdmError for a path, a name that is not there, or where there are no folders to look in."""
    _, named = adapters_in(request.prompt) if request.emphasis != "literal" else ("", ())
    if not named:
        return ()
    roots = model_roots(models or None)
    wanted = []
    for adapter in named:
        tag = f"prompt: <lora:{printable(adapter.name)[:200]}>"
        if adapter.name in (".", "..") or {PurePosixPath(adapter.name).name, PureWindowsPath(adapter.name).name} != {
            adapter.name
        }:
            raise LdmError(f"{tag}: found a path, expected the name of a file in --models, without folders")
        if not roots:
            raise LdmError(f"{tag}: found no folder to look in; name one by --models, or in {MODELS_VARIABLE}")
        try:
            path = find("lora", adapter.name, roots)
        except LdmError as error:
            raise LdmError(f"{tag}: {error}") from None
        wanted.append(Wanted(path, adapter.weight, adapter.text_weight))
    return tuple(wanted)


def wanted_by(flags: Sequence[Wanted], request: GenerateRequest, models: Sequence[Path] = ()) -> tuple[Wanted, ...]:
    """What the flags and a prompt ask for. Raises LdmError for a file that they ask for twice."""
    wanted = (*flags, *wanted_by_prompt(request, models))
    files: set[Path] = set()
    for one in wanted:
        if (file := one.path.resolve()) in files:
            raise LdmError(
                f"{printable(str(one.path))}: is asked for twice, by --lora or <lora:...>; give it once, with the sum"
                " of its weights"
            )
        files.add(file)
    return wanted


def read_files(wanted: Iterable[Wanted], *, allow_pickle: bool = False) -> dict[Path, Adapter]:
    """Each file once, with a word about what in it is left out."""
    adapters = {path: read_adapter(path, allow_pickle=allow_pickle) for path in {one.path: None for one in wanted}}
    for adapter in adapters.values():
        if adapter.bundled:
            names = printable(", ".join(adapter.bundled))
            to_stderr(f"warning: {printable(str(adapter.path))}: holds embeddings too, which are left out: {names}")
    return adapters


def choices(wanted: Iterable[Wanted], adapters: dict[Path, Adapter]) -> list[tuple[Adapter, float, float]]:
    """What `LatentDiffusion.with_adapters` takes."""
    return [(adapters[one.path], one.unet, one.text) for one in wanted]


def split_weights(text: str) -> tuple[str, float, float]:
    """FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT-WEIGHT -> file and weights for the U-Net and the text towers."""
    parts = text.split(":")
    weights: list[float] = []
    while len(parts) > 1 and len(weights) < 2 and (weight := _number(parts[-1])) is not None:
        weights.insert(0, weight)
        parts.pop()
    weights = weights or [1.0]
    return ":".join(parts), weights[0], weights[-1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

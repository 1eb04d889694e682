"""`ldm show IMAGE`: how a picture was made, by what its file tells, and what of it could be made again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ldm.apps.output.progress import in_one_line
from ldm.errors import LdmError
from ldm.pipeline.metadata.read import Metadata, read_metadata
from ldm.pipeline.metadata.remake import Remake
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.validation import shown, tuple_of_list

TEXTS = ("prompt", "negative")
ALWAYS = ("width", "height", "steps", "sampler", "schedule", "guidance", "seed")


def show(path: str | Path, *, as_json: bool = False) -> None:
    """Print what a picture's file tells. Raises `LdmError` where it is no picture; one that tells nothing is fine."""
    found = read_metadata(path)
    remake = found.remake()
    if as_json:
        whole = {"path": str(path), **asdict(found), "remake": None if remake is None else asdict(remake)}
        print(json.dumps(whole))
        return
    for line in page(Path(path), found, remake):
        print(in_one_line(line))


def page(path: Path, found: Metadata, remake: Remake | None) -> Iterator[str]:
    """The lines to print, which may hold anything that the file holds."""
    width, height = found.size
    by = "says nothing of how it was made" if remake is None else f"made by {remake.source}"
    yield f"{path}: {found.format} {width}x{height}, {by}"
    if remake is not None:
        yield from _request(remake)
    if found.record is not None:
        yield from _row("drawn in", _plain(found.record.get("dtype")))
        for name in ("adapters", "embeddings", "parts", "notes"):
            yield from _row(name, "; ".join(map(_plain, _list(found.record.get(name)))))
    for note in found.notes:
        yield from _row("note", note)
    if remake is not None:
        yield from _redo(path, remake)


def _request(remake: Remake) -> Iterator[str]:
    for name in TEXTS:
        yield from _row(name, _plain(remake.fields.get(name)))
    named = [_plain(remake.model), f"[{remake.model_hash[:10]}]" if remake.model_hash else ""]
    yield from _row("model", " ".join(filter(None, named)))
    told = (f"{name} {_plain(value)}" for name, value in remake.fields.items() if _worth_saying(name, value))
    yield from _row("settings", ", ".join(told))


def _worth_saying(name: str, value: object) -> bool:
    """Whether a field is one of those that everyone asks for, or is not at its default."""
    default = GenerateRequest.model_fields[name].default
    return value is not None and (name in ALWAYS or (name not in TEXTS and tuple_of_list(value) != default))


def _redo(path: Path, remake: Remake) -> Iterator[str]:
    """What `ldm redo` needs, and what it cannot do."""
    needed = [f"--{name} FILE{_known(digest)}" for name, digest in remake.pictures.items()]
    needed += [
        f"--control FILE --control-image FILE{_known(control.get('image_sha256'))}" for control in remake.controls
    ]
    needed += ["--refiner FILE"] if remake.fields.get("refine_at") is not None else []
    needed += ["--prior FILE"] if remake.fields.get("prior") is not None else []
    yield from _row("redo", " ".join(["ldm redo", shlex.quote(str(path)), *needed]))
    for miss in remake.misses:
        yield from _row("no match", miss)
    if not remake.pictures and not remake.controls:
        try:
            remake.request()
        except LdmError as error:
            yield from _row("no match", str(error))


def _known(digest: object) -> str:
    return f" (SHA-256 {_plain(digest)[:12]}...)" if digest else ""


def _row(name: str, text: str) -> Iterator[str]:
    """A name and its text, each line of which has one of its own; nothing where there is none."""
    for index, line in enumerate(text.splitlines()):
        yield f"  {name if index == 0 else '':10} {line}"


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _plain(value: object) -> str:
    """A text as it is; an object as "name value, name value"; anything else in short."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(inner)}" for name, inner in list(value.items())[:20] if inner is not None)
    return "" if value is None else value if isinstance(value, str) else shown(value)

"""What `ldm interpolate`, `ldm textdiff` and `ldm pca` share: their request, and a sheet of what was drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.apps.flags.requests import size_of
from ldm.apps.flags.shared import Decoding
from ldm.apps.output.progress import Bar, Stopwatch, to_stderr
from ldm.apps.output.tiles import with_axes
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, write_new
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.validation import shown

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline.sample import Picture, Progress

KEYWORD = "ldm-sequence"
"""The PNG text chunk that says, as JSON, how a sheet was made."""

MAX_PICTURES = 400
MAX_SHEET_PIXELS = 2**27


@dataclass(frozen=True)
class Axes:
    """The labels over a sheet's columns and before its rows."""

    columns: Sequence[str]
    rows: Sequence[str]


def check_sheet(output: Path, pictures: int) -> None:
    """Raise `LdmError` before anything slow has begun where there can be no such sheet."""
    if output.suffix.lower() != ".png":
        raise LdmError(f"{output}: expected a name that ends in .png")
    check_output(output)
    if pictures > MAX_PICTURES:
        raise LdmError(f"sheet: found {pictures} pictures, expected at most {MAX_PICTURES}; ask for fewer")


def request_of(decoding: Decoding) -> GenerateRequest:
    """The request that these flags make, by DDIM. Raises `LdmError` for what is wrong with them."""
    width, height = size_of("size", decoding.size) or (None, None)
    return GenerateRequest(
        prompt=decoding.prompt,
        negative=decoding.negative,
        width=width,
        height=height,
        steps=decoding.steps,
        sampler="ddim",
        guidance=decoding.guidance,
        eta=decoding.eta,
        seed=decoding.seed,
    )


def drawn(events: Iterator[Progress | Picture], count: int, bar: Bar, watch: Stopwatch) -> Iterator[Picture]:
    """The `count` pictures of a task as they come, the bar moving with the steps; each note is said once."""
    from ldm.pipeline.sample import Progress

    said: set[str] = set()
    for event in events:
        if isinstance(event, Progress):
            watch.mark("denoising")
            inverting = event.done == 0 and event.step is not None
            at = event.step.index + 1 if inverting and event.step is not None else event.done
            text = f"{'inverting' if inverting else f'picture {event.first + 1} of {count}'}  step {at}/{event.steps}"
            bar.at(text, event.first + event.count * event.done / event.steps)
            continue
        watch.mark("decoding")
        for note in event.notes:
            if note not in said:
                to_stderr(f"note: {note}")
            said.add(note)
        yield event


def save_sheet(
    pictures: Sequence[Image.Image], axes: Axes, output: Path, record: Mapping[str, Any], request: GenerateRequest
) -> Path:
    """Write the sheet as a PNG that says how it was made. request: of its first picture."""
    from PIL import PngImagePlugin

    width, height = pictures[0].size
    shrunk = (MAX_SHEET_PIXELS / (len(pictures) * width * height)) ** 0.5
    if shrunk < 1:
        pictures = [one.resize((max(1, int(width * shrunk)), max(1, int(height * shrunk)))) for one in pictures]
    info = PngImagePlugin.PngInfo()
    info.add_text(KEYWORD, json.dumps({"version": __version__, **record, "request": request.record()}))
    buffer = io.BytesIO()
    with_axes(pictures, axes.columns, axes.rows).save(buffer, "PNG", pnginfo=info, optimize=True)
    return write_new(output, buffer.getvalue())


def say(bar: Bar, path: Path, pictures: int, watch: Stopwatch, as_json: bool) -> None:
    """The result, in a line."""
    seconds = sum(watch.seconds.values())
    facts = {"path": str(path), "pictures": pictures, "seconds": round(seconds, 3)}
    bar.say(json.dumps(facts) if as_json else f"{path}  {pictures} pictures  {seconds:.1f} s")


def list_of(flag: str, text: str, words: Mapping[str, int | None]) -> list[int | None]:
    """ "3,7" -> [3, 7]; a word stands for what `words` says. Raises `LdmError` for anything else."""
    found: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        if part in words:
            found.append(words[part])
        elif part.isascii() and part.isdigit() and len(part) < 20:
            found.append(int(part))
        else:
            either = " or ".join(["whole numbers", *words])
            raise LdmError(f"{flag}: found {shown(part)}, expected {either}, with commas between them")
    return found

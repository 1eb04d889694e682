"""`ldm grid`: one prompt over the values of one field or two, in one picture with labelled axes."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from ldm import __version__
from ldm.apps.flags.axes import MAX_CELLS, NO_AXIS, Axis, axis_of, request_at
from ldm.apps.flags.commands import Grid
from ldm.apps.flags.requests import detail_fields, expanded, highres_of, picture, sampling_fields
from ldm.apps.flags.shared import Model
from ldm.apps.generate import adapted, draw, hash_in_background, load_plain
from ldm.apps.output.progress import Bar, Stopwatch, progress_bar, to_stderr
from ldm.apps.output.tiles import centred, message_tile, with_axes
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, write_new
from ldm.pipeline.request import GenerateRequest
from ldm.pipeline.validation import shown

if TYPE_CHECKING:
    from PIL import Image

    from ldm.apps.flags.adapters import Wanted
    from ldm.pipeline.latent_diffusion import LatentDiffusion
    from ldm.weights.adapters.read import Adapter

MAX_GRID_PIXELS = 2**27
"""Of a grid's tiles in all; larger ones are made smaller."""

KEYWORD = "ldm-grid"
"""The PNG text chunk that holds a grid's axes, and the request of its first cell, as JSON."""

T = TypeVar("T")
Place = tuple[int, int]
"""(row, column)"""
Result = Union["Image.Image", LdmError]
"""What a cell becomes: its picture, or why there is none."""


@dataclass(frozen=True)
class Cell:
    """A place in the grid and what is drawn there.

    model: a value of the axis `model`; lora: of the axis `lora`; None where there is no such axis
    wanted: all adapters that it is drawn with
    """

    row: int
    column: int
    label: str
    request: GenerateRequest
    model: str | None = None
    lora: float | None = None
    wanted: tuple[Wanted, ...] = ()


def grid(command: Grid) -> None:
    """Draw the grid and write it as a PNG that says in a text chunk what it shows.

    All requests and files are looked at before anything is drawn. A cell that fails is grey, and says why; `LdmError`
    is raised when the others are on disk. So is KeyboardInterrupt: what was drawn before it is kept.
    """
    if command.output.suffix.lower() != ".png":
        raise LdmError(f"{command.output}: expected a name that ends in .png")
    check_output(command.output)
    if command.cells is not None:
        check_output(command.cells / "row-1-column-1.png")
    x, y = axis_of(command.x), axis_of(command.y) if command.y else NO_AXIS
    cells = cells_of(command, x, y)
    watch = Stopwatch()
    with progress_bar(len(cells)) as bar:
        drawn, stopped = _drawn(command, cells, bar, watch)
        failed = {place: str(result) for place, result in drawn.items() if isinstance(result, LdmError)}
        if len(failed) == len(cells):
            raise KeyboardInterrupt if stopped else LdmError(next(iter(failed.values())))
        path = _save(_picture(drawn, x, y), command, (x, y), cells[0].request, failed)
        bar.say(f"{path}  {len(cells)} pictures, {len(failed)} failed  {sum(watch.seconds.values()):.1f} s")
    if stopped:
        raise KeyboardInterrupt
    if failed:
        first = next(iter(failed.values()))
        raise LdmError(f"{path}: {len(failed)} of {len(cells)} pictures could not be drawn; the first: {first}")


def cells_of(command: Grid, x: Axis, y: Axis) -> list[Cell]:
    """All cells, row by row, their requests validated. Raises `LdmError` for one that cannot be."""
    if x.field == y.field:
        raise LdmError(f"y: found {x.field}, which x has already, expected another field")
    if len(x.values) * len(y.values) > MAX_CELLS:
        raise LdmError(f"grid: found {len(x.values)} x {len(y.values)} cells, expected at most {MAX_CELLS} in all")
    if "lora" in (x.field, y.field) and len(command.model.lora) != 1:
        raise LdmError(f"lora: found {len(command.model.lora)} to weigh, expected one; give --lora once")
    fields = sampling_fields(command.sampling) | detail_fields(command.details)
    fields |= {"prompt": command.prompt, "highres": highres_of(command.second_pass), "strength": command.strength}
    fields |= {"seed": secrets.randbelow(2**32) if command.seed == -1 else command.seed}
    fields |= {"image": None if command.image is None else picture(command.image)}
    firsts = {axis.field: axis.values[0] for axis in (x, y)}
    if (sought := firsts.get("prompt")) is not None and sought not in fields["prompt"] + "\n" + fields["negative"]:
        raise LdmError(f"prompt: found no {shown(sought)} in it to put others in its place; name one of its words")
    cells = []
    for row, (down, y_label) in enumerate(zip(y.values, y.labels, strict=True)):
        for column, (across, x_label) in enumerate(zip(x.values, x.labels, strict=True)):
            values: dict[str, Any] = {x.field: across, y.field: down}
            request = request_at(fields, values, firsts)
            request = expanded(request, command.details.reading.wildcards)[0]
            label = ", ".join(part for part in (x_label, y_label) if part)
            cells.append(Cell(row, column, label, request, values.get("model"), values.get("lora")))
    return cells


def _drawn(command: Grid, cells: Sequence[Cell], bar: Bar, watch: Stopwatch) -> tuple[dict[Place, Result], bool]:
    """What came of each cell, row by row, and whether the rest was interrupted."""
    stopped = LdmError("not drawn: interrupted")
    drawn: dict[Place, Result] = {(cell.row, cell.column): stopped for cell in cells}
    try:
        for cell, result in _results(command, cells, bar, watch):
            drawn[cell.row, cell.column] = result
    except KeyboardInterrupt:
        return drawn, True
    return drawn, False


def _results(command: Grid, cells: Sequence[Cell], bar: Bar, watch: Stopwatch) -> Iterator[tuple[Cell, Result]]:
    """Draw the cells, in the order in which each model is loaded once, and each set of adapters put on once."""
    cells, adapters = _with_adapters(command.model, cells)
    files = {cell.model: _model_file(command.model, cell.model) for cell in cells}
    order = list(dict.fromkeys((cell.model, cell.wanted) for cell in cells))
    models = list(files)
    work = sorted(cells, key=lambda cell: (models.index(cell.model), order.index((cell.model, cell.wanted))))
    done, said = 0, set[str]()
    for name, group in groupby(work, key=lambda cell: cell.model):
        model = replace(command.model, file=files[name])
        for cell, result in _drawn_by(model, command, list(group), adapters, bar, watch, done):
            if isinstance(result, LdmError) and str(result) not in said:
                to_stderr(f"{cell.label}: {result}")
                said.add(str(result))
            done += 1
            yield cell, result


def _drawn_by(
    given: Model,
    command: Grid,
    cells: Sequence[Cell],
    adapters: dict[Path, Adapter],
    bar: Bar,
    watch: Stopwatch,
    done: int,
) -> Iterator[tuple[Cell, Result]]:
    """Load one model and draw its cells. `done` cells came before."""
    requests = [cell.request for cell in cells]
    plain = _attempt(
        partial(load_plain, given, watch, command.details, requests, adapted=any(cell.wanted for cell in cells))
    )
    model_hash = None
    if command.cells is not None and not isinstance(plain, LdmError):
        model_hash = hash_in_background(plain.origin.path)
    for wanted, group in groupby(cells, key=lambda cell: cell.wanted):
        model = plain if isinstance(plain, LdmError) else _attempt(partial(adapted, plain, wanted, adapters))
        for cell in group:
            if isinstance(model, LdmError):
                result: Result = model
            else:
                folder = command.cells
                result = _attempt(partial(_tile, model, cell, folder, model_hash, bar, watch, done))
            done += 1
            yield cell, result


def _tile(
    model: LatentDiffusion,
    cell: Cell,
    folder: Path | None,
    model_hash: Future[str | None] | None,
    bar: Bar,
    watch: Stopwatch,
    done: int,
) -> Image.Image:
    """The picture of a cell, in a file of its own, too, where there is a folder for it."""
    (drawn,) = draw(model, cell.request, bar, watch, done)
    if folder is not None:
        name = f"row-{cell.row + 1}-column-{cell.column + 1}.png"
        drawn.save(folder / name, model_hash=None if model_hash is None else model_hash.result())
        watch.mark("saving")
    return drawn.image


def _attempt(make: Callable[[], T]) -> T | LdmError:
    """What `make` makes, or why it cannot: a user's error, or no memory left. Whatever else goes wrong is raised."""
    try:
        return make()
    except LdmError as error:
        return error
    except (RuntimeError, MemoryError) as error:
        from ldm.pipeline.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return LdmError("no memory left; draw smaller pictures")


def _with_adapters(model: Model, cells: Sequence[Cell]) -> tuple[list[Cell], dict[Path, Adapter]]:
    """The cells with the adapters that the flags, the axes and the prompts ask for, and these as they were read."""
    if not model.lora and not any("<" in cell.request.prompt for cell in cells):
        return list(cells), {}
    from ldm.apps.flags.adapters import read_files, wanted_by, wanted_by_flags

    by_flags = wanted_by_flags(model.lora, model.models)
    found = []
    for cell in cells:
        flagged = by_flags
        if cell.lora is not None:
            flagged = tuple(replace(one, unet=cell.lora, text=cell.lora) for one in by_flags)
        found.append(replace(cell, wanted=wanted_by(flagged, cell.request, model.models)))
    return found, read_files((one for cell in found for one in cell.wanted), allow_pickle=model.allow_pickle)


def _model_file(model: Model, name: str | None) -> Path | None:
    """The file that a value of the axis `model` means. Raises `LdmError` where there is none."""
    if name is None:
        return model.file
    from ldm.weights.find import locate, model_roots

    path = locate("checkpoint", name, model_roots(model.models or None))
    if not os.path.exists(path):  # noqa: PTH110 (says no, where Path raises, of a name that is too long)
        raise LdmError(f"model: {shown(str(path))}: no such file")
    return path


def _picture(drawn: dict[Place, Result], x: Axis, y: Axis) -> Image.Image:
    """All tiles, each in the middle of the room that the largest one needs."""
    pictures = [result for result in drawn.values() if not isinstance(result, LdmError)]
    size = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    tiles = [
        message_tile(str(result), size) if isinstance(result, LdmError) else centred(result, size)
        for result in drawn.values()
    ]
    shrunk = math.sqrt(MAX_GRID_PIXELS / (len(tiles) * size[0] * size[1]))
    if shrunk < 1:
        tiles = [tile.resize((max(1, int(size[0] * shrunk)), max(1, int(size[1] * shrunk)))) for tile in tiles]
    return with_axes(tiles, x.labels, y.labels)


def _save(
    image: Image.Image, command: Grid, axes: tuple[Axis, Axis], first: GenerateRequest, failed: dict[Place, str]
) -> Path:
    from PIL import PngImagePlugin

    x, y = axes
    record = {
        "version": __version__,
        "x": {"field": x.field, "values": x.shown},
        "y": {"field": y.field, "values": y.shown} if y is not NO_AXIS else None,
        "request": first.record(),
        "model": None if command.model.file is None else command.model.file.name,
        "adapters": [Path(given).name for given in command.model.lora],
        "failed": [{"row": row, "column": column, "error": text} for (row, column), text in failed.items()],
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(KEYWORD, json.dumps(record))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, optimize=True)
    return write_new(command.output, buffer.getvalue())

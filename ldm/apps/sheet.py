"""`ldm sheet`: a grid of one picture for each prompt, with one seed and no choosing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.flags.commands import Sheet
from ldm.apps.flags.requests import sampling_fields
from ldm.apps.generate import draw, load_model
from ldm.apps.output.progress import Stopwatch, progress_bar
from ldm.apps.output.tiles import compose
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, read_file, write_new
from ldm.pipeline.request import GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

MAX_PROMPTS = 400


def sheet(command: Sheet) -> None:
    """Draw the sheet and write it as PNG, its prompts in a text chunk. Raises `LdmError` for what cannot be."""
    if command.columns < 1:
        raise LdmError(f"columns: found {command.columns}, expected 1 or more")
    if command.output.suffix.lower() != ".png":
        raise LdmError(f"{command.output}: expected a name that ends in .png")
    check_output(command.output)
    prompts = _prompts(command.prompts)
    fields = sampling_fields(command.sampling)
    requests = [GenerateRequest(prompt=prompt, seed=command.seed, **fields) for prompt in prompts]
    watch = Stopwatch()
    with progress_bar(len(requests)) as bar:
        model = load_model(command.model, watch)
        pictures = [
            picture.image for done, request in enumerate(requests) for picture in draw(model, request, bar, watch, done)
        ]
        grid = compose(pictures, command.columns, prompts if command.labels else None)
        path = _save(grid, command, prompts)
        bar.say(f"{path}  {len(pictures)} pictures, seed {command.seed}  {sum(watch.seconds.values()):.1f} s")


def _prompts(path: Path | None) -> list[str]:
    """The prompts of a JSON list of texts or of objects with a "prompt"."""
    if path is None:
        from ldm.data.heldout import read_prompts

        found, name = read_prompts(), "the package's prompts"
    else:
        name = str(path)
        try:
            found = json.loads(read_file(path, 16 * 2**20))
        except (ValueError, RecursionError):
            raise LdmError(f"{name}: is not JSON, expected a list of prompts") from None
    items = found if isinstance(found, list) else []
    texts = [item.get("prompt") if isinstance(item, dict) else item for item in items]
    prompts = [text for text in texts if isinstance(text, str)]
    if not 0 < len(prompts) == len(texts) <= MAX_PROMPTS:
        raise LdmError(f'{name}: expected a list of 1 to {MAX_PROMPTS} texts, or of objects with a "prompt"')
    return prompts


def _save(grid: Image.Image, command: Sheet, prompts: Sequence[str]) -> Path:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("ldm-sheet", json.dumps({"seed": command.seed, "columns": command.columns, "prompts": list(prompts)}))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG", pnginfo=info, optimize=True)
    return write_new(command.output, buffer.getvalue())

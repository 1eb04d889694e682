"""`ldm search "WORDS" --index DIR`: the pictures nearest to words, to a picture, or to a sum of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.apps.flags.clip_inputs import clip_of_command, raise_unread, readable
from ldm.apps.flags.commands import Search
from ldm.apps.output.progress import in_one_line
from ldm.apps.output.tiles import centred, compose, message_tile
from ldm.errors import LdmError
from ldm.pipeline.files import check_output, names_file, read_file, write_new
from ldm.pipeline.images import LARGE_BYTES, read_shrunk
from ldm.search import Hit, combined, open_index
from ldm.search.embed import vectors_of
from ldm.search.query import MAX_TOP
from ldm.search.store import check_maker
from ldm.weights.io import printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ldm.pipeline.clip.model import CLIP

TILE = 128
COLUMNS = 6
MAX_SHEET = 1000
MAX_WORDS = 1000


def search(command: Search) -> None:
    """Print what is found, and draw the sheet that was asked for. Raises `LdmError` for what cannot be."""
    _check(command)
    index = open_index(command.index)
    images, unread = readable(command.image)
    raise_unread(unread, len(command.image))
    clip = clip_of_command(command.clip, [*command.words, *command.plus, *command.minus])
    check_maker(index.path, index.record, clip)
    hits = index.search(_query(command, clip, [image for _, image in images]), command.top)[0]
    sheet = None if command.output is None else _write_sheet(command.output, hits)
    if command.json:
        print(json.dumps(_as_json(command, hits, sheet)))
        return
    digits = len(str(len(hits)))
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:>{digits}}  {hit.score:.4f}  {printable(str(hit.path))}")
    if sheet is not None:
        print(in_one_line(f"{sheet}  {len(hits)} pictures"))


def _check(command: Search) -> None:
    """Raise `LdmError` early for what can be seen to be wrong before anything is loaded."""
    if not (command.words or command.plus or command.image):
        raise LdmError("search: found nothing to look for, expected words or --image FILE")
    if any(not words.strip() for words in (*command.words, *command.plus, *command.minus)):
        raise LdmError("search: found an empty text, expected words")
    if any(len(words) > MAX_WORDS for words in (*command.words, *command.plus, *command.minus)):
        raise LdmError(f"search: found a text of more than {MAX_WORDS} characters, expected a shorter one")
    if not 1 <= command.top <= MAX_TOP:
        raise LdmError(f"top: found {command.top}, expected 1 to {MAX_TOP}")
    if command.output is not None:
        if not names_file(command.output) or command.output.suffix.lower() != ".png":
            raise LdmError(f"{printable(str(command.output))}: expected a name that ends in .png")
        check_output(command.output)
        if command.top > MAX_SHEET:
            raise LdmError(f"top: found {command.top} with a sheet, expected at most {MAX_SHEET}")


def _query(command: Search, clip: CLIP, images: Sequence[Image.Image]) -> np.ndarray:
    """All that was given as one unit vector (1, P)."""
    plus = [*clip.text_vectors([*command.words, *command.plus]).numpy(), *vectors_of(clip, images)]
    return combined(plus, list(clip.text_vectors(command.minus).numpy()))


def _as_json(command: Search, hits: Sequence[Hit], sheet: Path | None) -> dict[str, object]:
    return {
        "words": [*command.words, *command.plus],
        "images": [str(path) for path in command.image],
        "minus": list(command.minus),
        "sheet": None if sheet is None else str(sheet),
        "results": [
            {"rank": rank, "score": round(hit.score, 6), "path": str(hit.path)}
            for rank, hit in enumerate(hits, start=1)
        ],
    }


def _write_sheet(output: Path, hits: Sequence[Hit]) -> Path:
    """The pictures that were found, side by side, each with its rank, score and name."""
    tiles = [_tile(hit.path) for hit in hits]
    labels = [f"{rank}  {hit.score:.3f} {printable(hit.path.name)}" for rank, hit in enumerate(hits, start=1)]
    buffer = io.BytesIO()
    compose(tiles, COLUMNS, labels).save(buffer, "PNG", optimize=True)
    return write_new(output, buffer.getvalue())


def _tile(path: Path) -> Image.Image:
    size = (TILE, TILE)
    try:
        image = read_shrunk(read_file(path, LARGE_BYTES))
    except LdmError:
        return message_tile("moved, deleted or damaged since it was indexed", size)
    image.thumbnail(size)
    return centred(image, size)

"""`ldm check FOLDER`: what is wrong or doubtful about pictures, before a model is tuned on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ldm.apps.output.check_page import THUMBNAIL, page_bytes, thumbnail
from ldm.apps.output.progress import progress_bar
from ldm.apps.output.rows import grid
from ldm.data.buckets import Buckets, usual_buckets
from ldm.data.captions import CaptionRules
from ldm.data.check import ENLARGED, TOKENS, Checked, Seen
from ldm.data.check import check as judge
from ldm.data.example import Defaults, Example
from ldm.data.look import Look, examine
from ldm.data.picture_set import read_pictures
from ldm.errors import LdmError, printable
from ldm.models.tokenizer import word_ids
from ldm.pipeline.files import check_output, write_new
from ldm.pipeline.images import read_shrunk

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from ldm.apps.flags.commands import Check
    from ldm.apps.flags.shared import PictureFolder

SIZE = 128
"""Of the model that ships, in pixels."""

SHOWN = 10
"""How many lines of a kind the terminal shows; the page and JSON have them all."""


def check(command: Check) -> None:
    """Print what was found, and write the page that was asked for. Raises LdmError where no picture can be used."""
    if command.page is not None:
        _check_page(command.page)
    buckets = buckets_of(command.pictures, SIZE)
    pictures = read_pictures(command.folder, defaults_of(command.pictures))
    thumbnails: dict[str, bytes] = {}
    with progress_bar(len(pictures.examples)) as bar:

        def seen(number: int, example: Example, _: Look, picture: Image.Image) -> None:
            bar.at("looking", number + 1)
            if command.page is not None:
                thumbnails[example.name] = thumbnail(picture)

        pictures, looks = examine(pictures, partial(read_shrunk, side=2 * THUMBNAIL), seen)
    checked = judge(pictures, looks, buckets, lambda caption: len(word_ids(caption)))
    if command.json:
        print(json.dumps(as_json_object(checked), indent=2))
    else:
        console = Console()
        for block in (grid(_summary(checked)), _buckets(checked), grid(_findings(checked))):
            if block is not None:
                console.print(block)
                console.print()
    if command.page is not None:
        path = write_new(command.page, page_bytes(checked, thumbnails, command.page.suffix.lower()))
        if not command.json:
            print(printable(str(path)))


def defaults_of(pictures: PictureFolder) -> Defaults:
    """What the flags say of a data set."""
    return Defaults(
        CaptionRules(wildcards=pictures.wildcards),
        class_tokens=pictures.class_tokens,
        caption_suffix=pictures.caption_ending,
        masks=pictures.masks,
        hints=pictures.hints,
        regular=pictures.class_pictures,
        regular_tokens=pictures.class_caption,
    )


def buckets_of(pictures: PictureFolder, usual: int) -> Buckets:
    """The sizes that the flags ask for; usual: the side where they ask for none.

    Raises LdmError for a size that no model has.
    """
    side = usual if pictures.size is None else pictures.size
    if not 64 <= side <= 2048 or side % 8:
        raise LdmError(f"size: found {side}, expected a multiple of 8 from 64 to 2048")
    return usual_buckets(side, step=pictures.bucket_step, upscale=not pictures.no_upscale)


def as_json_object(checked: Checked) -> dict[str, object]:
    """What was found, and how many of each."""
    names = ("pictures", "left_out", "duplicates", "alike", "tiny", "long", "wordy", "uncaptioned")
    counts = {name: len(getattr(checked, name)) for name in names}
    return {"counts": {**counts, "shown": checked.shown}, **asdict(checked)}


def _check_page(page: Path) -> None:
    if page.suffix.lower() not in (".html", ".png"):
        raise LdmError(f"{printable(str(page))}: expected a page's name that ends in .html or .png")
    check_output(page.with_suffix(".png"))


def _summary(checked: Checked) -> Iterator[tuple[str, str]]:
    yield "data", checked.root
    own = [seen for seen in checked.pictures if not seen.regular]
    regular = len(checked.pictures) - len(own)
    shown = f", {checked.shown} in an epoch with their repeats" if checked.shown != len(own) else ""
    of_class = f"; {regular} of the class" if regular else ""
    masked = sum(seen.masked for seen in checked.pictures)
    left_out = f"; {len(checked.left_out)} files left out" if checked.left_out else ""
    yield "pictures", f"{len(own)} can be used{shown}{of_class}{f', {masked} with a mask' if masked else ''}{left_out}"
    yield "captions", _captions(checked.pictures)


def _captions(pictures: Sequence[Seen]) -> str:
    captions = [caption for seen in pictures for caption in seen.captions]
    tokens = sorted(seen.tokens for seen in pictures if seen.tokens is not None)
    lengths = f", of {tokens[0]} to {tokens[-1]} tokens" if tokens else ""
    return f"{len(captions)}{lengths}, {len(set(captions))} of them different"


def _buckets(checked: Checked) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("bucket", "pictures", "in an epoch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for bucket in checked.buckets:
        table.add_row(f"{bucket.width} x {bucket.height}", str(bucket.pictures), str(bucket.shown))
    return table


def _findings(checked: Checked) -> Iterator[tuple[str, str]]:
    if checked.left_out:
        yield from _lines("LEFT OUT", checked.left_out)
    why = {seen.name: seen for seen in checked.pictures}
    yield from _lines("same file", [", ".join(group) for group in checked.duplicates])
    yield from _lines("look alike", [", ".join(group) for group in checked.alike])
    yield from _lines("no caption", checked.uncaptioned)
    yield from _lines(f"over {TOKENS} tokens", [f"{name}: {why[name].tokens}" for name in checked.wordy])
    yield from _lines(f"enlarged > {ENLARGED:g}", [f"{name}: {_size(why[name])}" for name in checked.tiny])
    yield from _lines("much cut off", [_cut(why[name]) for name in checked.long])
    yield from _lines("note", [f"{seen.name}: {remark}" for seen in checked.pictures for remark in seen.remarks])
    yield from _lines("note", checked.notes)
    if not any((checked.left_out, *(seen.faults for seen in checked.pictures))):
        yield "verdict", "nothing to see to"


def _lines(what: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines[:SHOWN]):
        yield what if number == 0 else "", line
    if len(lines) > SHOWN:
        yield "", f"and {len(lines) - SHOWN} more (see --json or --page)"


def _size(seen: Seen) -> str:
    return "{}x{}".format(*seen.crop.original)


def _cut(seen: Seen) -> str:
    return f"{seen.name}: {_size(seen)}, {seen.crop.kept:.0%} is kept"

"""What the commands that look at pictures with CLIP are given: the model, texts, picture files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.apps.flags.shared import ClipModel
from ldm.apps.output.progress import to_stderr
from ldm.errors import LdmError
from ldm.pipeline.clip.load import load_clip
from ldm.pipeline.clip.model import CLIP, check_shape
from ldm.pipeline.files import read_file
from ldm.pipeline.images import LARGE_BYTES, read_shrunk

MAX_TEXT_FILE = 8 * 2**20
TEXT_FILES = (".txt", ".csv", ".tsv", ".json", ".md", ".lst")
"""Endings that no label has: a file is meant, also where it is missing."""


def clip_of_command(model: ClipModel, texts: Sequence[str] = ()) -> CLIP:
    """The CLIP that is asked for; what there is to say of it, and of texts that it does not read, goes to stderr."""
    clip = load_clip(model.file, config=model.config, device=model.device, allow_pickle=model.allow_pickle)
    for note in (*clip.notes, *clip.notes_on(texts)):
        to_stderr(note)
    return clip


def texts_of(given: Sequence[str], field: str) -> list[str]:
    """Texts, each argument a list with commas or the name of a file with one text a line, in which commas are text.

    field: its name, which is the flag's. Blank lines of a file are left out. Raises `LdmError` where nothing is given,
    and for a file that is missing or holds no text.
    """
    if not given:
        raise LdmError(f"{field}: none are given; name them, as --{field} cat,dog or --{field} FILE")
    return [text for argument in given for text in (_lines(argument, field) or argument.split(","))]


def _lines(argument: str, field: str) -> list[str]:
    """The lines of the file that is named; none where no file is meant."""
    path = Path(argument)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL
        return []
    if not is_file:
        if path.suffix.lower() in TEXT_FILES:
            raise LdmError(f"{field}: there is no file {argument}; check the path, or give the texts with commas")
        return []
    try:
        text = read_file(path, MAX_TEXT_FILE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LdmError(f"{argument}: is no text in UTF-8; expected one text a line") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise LdmError(f"{argument}: is empty; expected one text a line")
    return lines


def check_some(images: Sequence[Path]) -> None:
    """Raise `LdmError` where no picture is given."""
    if not images:
        raise LdmError("no pictures: give the names of one or more PNG, JPEG or WebP files")


def readable(images: Sequence[Path]) -> tuple[list[tuple[Path, Image.Image]], list[str]]:
    """The pictures that can be read, upright and RGB, and a line for each of the others."""
    good, bad = [], []
    for path in images:
        try:
            image = read_shrunk(read_file(path, LARGE_BYTES))
            check_shape(image)
            good.append((path, image))
        except LdmError as error:
            bad.append(
                str(error).replace("image: ", f"{path}: ", 1) if str(error).startswith("image: ") else str(error)
            )
    return good, bad


def raise_unread(bad: Sequence[str], count: int) -> None:
    """Name the pictures that were not read; the last word is an error. Raises `LdmError` where there is any."""
    if not bad:
        return
    if len(bad) == count == 1:
        raise LdmError(bad[0])
    for line in bad:
        to_stderr(line)
    raise LdmError(f"{len(bad)} of {count} pictures could not be read; they are named above")

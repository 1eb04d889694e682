"""Picture shards: WebDataset tars in which KEY.webp and KEY.json are one sample, a square picture and its record.

Reading the tars is webdataset's work; here are the checks that give a broken shard one clear line.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.records import Record
from ldm.errors import LdmError

IMAGE_SUFFIXES = ("webp", "png", "jpg")

MAX_SIDE = 4096
"""Pixels. A header that claims a larger picture is refused before it is decoded."""


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where it lies, its record and its undecoded picture."""

    name: str
    record: Record
    image: bytes


def read_shards(paths: Iterable[Path], skipped: list[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of the shards in order.

    skipped: a list that takes one line for each sample or shard that cannot be read. Without it the first fault
    raises LdmError: a shard cut short, a picture without its record or the reverse, a record that is not JSON or has
    no captions.
    """
    for path in paths:
        if not ends_like_a_tar(path):
            fault(f"{path}: incomplete, does not end as a tar does; copy the shard again", skipped)
        for name, parts in _members(path, skipped):
            try:
                yield _sample(name, parts)
            except LdmError as error:
                fault(str(error), skipped)


def decode(image: bytes, size: int, name: str = "picture") -> np.ndarray:
    """Decode a square picture to uint8 (size, size, 3).

    Shrinks by area averaging, which leaves no halos at the hard edges of flat art. Raises LdmError, naming `name`, for
    bytes that no decoder reads, and for a picture that is not square or has a side above MAX_SIDE.
    """
    try:
        with Image.open(io.BytesIO(image), formats=("WEBP", "PNG", "JPEG")) as picture:
            width, height = picture.size
            if width != height or width > MAX_SIDE:
                raise LdmError(f"{name}: {width}x{height} pixels, expected a square of at most {MAX_SIDE}; crop it")
            rgb = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LdmError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    if rgb.width != size:
        rgb = rgb.resize((size, size), Image.Resampling.BOX)
    return np.asarray(rgb)


def fault(message: str, skipped: list[str] | None) -> None:
    """Note a fault in `skipped`, or raise it as LdmError where there is no such list."""
    if skipped is None:
        raise LdmError(message)
    skipped.append(message)


def _members(path: Path, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one tar: where each lies, and its files by suffix."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # brings torch along: only where it is needed

    try:
        with path.open("rb") as stream:
            for parts in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                yield f"{path}: {parts['__key__']}", parts
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
        fault(f"{path}: not a whole tar ({reason}); copy the shard again", skipped)


def _sample(name: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    if image is None:
        raise LdmError(f"{name}: no picture, expected {', '.join(IMAGE_SUFFIXES)}; add it or remove the record")
    if "json" not in parts:
        raise LdmError(f"{name}.json: missing, expected beside its picture; add it or remove the picture")
    try:
        record = json.loads(parts["json"])
    except ValueError as error:
        raise LdmError(f"{name}.json: not JSON ({error}); mend or remove the sample") from error
    texts = record.get("texts") if isinstance(record, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise LdmError(f"{name}.json: 'texts' is {texts!r:.40}, expected a list of captions; mend the record")
    return Sample(name, record, image)


def ends_like_a_tar(path: Path) -> bool:
    """A tar ends with two blocks of zeros; without this look, one cut between two members would read as whole."""
    try:
        with path.open("rb") as file:
            file.seek(-1024, os.SEEK_END)
            return not any(file.read())
    except OSError:  # shorter than that, or not there
        return False

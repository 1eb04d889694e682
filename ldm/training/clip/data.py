"""Pictures with captions for CLIP, from a folder, from WebDataset shards or from a packed set.

Folders and shards are decoded once, into a packed set beside the run (`ldm.data.packed`): what cannot be used is found
and named before anything is trained, and steps read nothing but mapped memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ldm.data.packed import open_packed, write_packed
from ldm.data.records import Record, may_flip
from ldm.errors import LdmError
from ldm.pipeline.files import read_file
from ldm.pipeline.images import LARGE_BYTES, read_shrunk
from ldm.weights.atomic import replacing
from ldm.weights.io import printable

log = logging.getLogger(__name__)

SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("texts", "caption", "text")
"""Where a JSON file beside a picture may hold its caption or a list of them."""
MAX_CAPTION_BYTES = 2**20
NAMED = 20
"""Of the pictures that were left out, so many are named in the log; all of them in a file."""

Parts = dict[str, bytes]
Sample = tuple[str, Parts | LdmError]
"""A picture's name, and its files by suffix, or why they cannot be read."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought to a square of `size` pixels.

    resize: "shortest" fits the shorter side and cuts the longer one in its middle, "squash" fits both.
    """

    size: int
    resize: Literal["shortest", "squash"] = "shortest"
    resample: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures uint8 (N, side, side, 3), and of each its name, its captions, and whether it may be mirrored.

    kept, held_out: numbers of the pictures that are trained on, and of those that never are.
    """

    pictures: np.ndarray
    names: Sequence[str]
    texts: Sequence[Sequence[str]]
    flips: np.ndarray
    kept: np.ndarray
    held_out: np.ndarray

    def digest(self) -> str:
        """The same for the same names, captions, mirroring and split."""
        split = [self.held_out.tolist(), np.flatnonzero(self.flips).tolist()]
        told = json.dumps([list(self.names), [list(texts) for texts in self.texts], split])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def open_pairs(source: Path, packed: Path, fit: Fit, *, held_out: float, mirror: bool, seed: int) -> Pairs:
    """Pictures and captions of `source`, decoded into the folder `packed` unless they are packed already.

    source: a folder of pictures with KEY.txt or KEY.json beside them, in folders of any depth; a .tar or a folder of
    .tar shards of such files; or a folder that holds a packed set.
    held_out: the share, in (0, 1), drawn by `seed`, that is not trained on.
    mirror: whether half of the pictures are mirrored, those whose English captions speak of no side.

    Raises LdmError where nothing is found or nothing of it can be used.
    """
    if not source.exists():
        raise LdmError(f"data: {printable(str(source))}: not found; give a folder of pictures with captions, or shards")
    pictures, records = _open_packed_in(source, fit.size) or _packed(source, packed, fit)
    count = len(records)
    if count < 2:
        raise LdmError(f"data: {printable(str(source))}: found {count} usable picture, expected 2 at least")
    for number, record in enumerate(records, 1):
        if not _is_record(record):
            expected = 'an object with "texts", a list of captions; pack the pictures again'
            raise LdmError(f"data: {printable(str(source))}: record {number} is not {expected}")
    order = np.random.default_rng(seed).permutation(count)
    aside = min(count - 1, max(1, round(held_out * count)))
    return Pairs(
        pictures,
        [str(record.get("key", number)) for number, record in enumerate(records)],
        [record["texts"] for record in records],
        np.array([mirror and may_flip(record) for record in records]),
        np.sort(order[aside:]),
        np.sort(order[:aside]),
    )


def _is_record(record: object) -> bool:
    """Whether a line of a packed set's records has captions."""
    texts = record.get("texts") if isinstance(record, dict) else None
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)


def _open_packed_in(folder: Path, size: int) -> tuple[np.ndarray, list[Record]] | None:
    """The packed set of a folder, the smallest that is `size` pixels or more, else the largest; None without any."""
    found = {}
    for path in folder.glob("*-*.npy"):
        name, _, side = path.stem.rpartition("-")
        if side.isdigit() and (folder / f"{name}.jsonl").is_file():
            found[int(side), name] = path
    if not found:
        return None
    large = [key for key in found if key[0] >= size]
    side, name = min(large) if large else max(found)
    if side < size:
        log.warning("data: %s holds pictures of %d pixels, which are enlarged to %d", folder, side, size)
    return open_packed(folder, side, name)


def _packed(source: Path, packed: Path, fit: Fit) -> tuple[np.ndarray, list[Record]]:
    """The packed set of a folder or of shards, made anew where the files are not those that it was made of."""
    files = _files(source)
    mark = {"files": _fingerprint(source, files), "size": fit.size, "resize": fit.resize, "resample": fit.resample}
    note = packed / "source.json"
    if _noted(note) == mark:
        return open_packed(packed, fit.size)
    faults: list[str] = []
    pairs = _decoded(_samples(source, files), fit, faults)
    first = next(pairs, None)
    if first is None:
        why = f" ({faults[0]})" if faults else ""
        raise LdmError(f"data: {printable(str(source))}: none of {len(faults)} pictures can be used{why}; mend them")
    packed.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    write_packed(chain([first], pairs), packed, fit.size, "pictures")
    found = open_packed(packed, fit.size)
    _report(faults, len(found[1]), packed / "skipped.txt")
    with replacing(note) as file:
        file.write(json.dumps(mark).encode())
    return found


def _noted(note: Path) -> object:
    """What a packed set was made of; None where that is not known, or cannot be read."""
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _files(source: Path) -> list[Path]:
    """The shards of a source, or else its pictures, in order."""
    if source.is_file():
        if source.suffix.lower() != ".tar":
            raise LdmError(f"data: {printable(str(source))}: expected a folder or a .tar shard")
        return [source]
    if shards := sorted(source.glob("*.tar")):
        return shards
    pictures = sorted(path for path in source.rglob("*") if path.suffix.lower().lstrip(".") in SUFFIXES)
    if not pictures:
        expected = f"{', '.join(SUFFIXES)} pictures with captions beside them, or .tar shards"
        raise LdmError(f"data: {printable(str(source))}: found no pictures, expected {expected}")
    return pictures


def _fingerprint(source: Path, files: Sequence[Path]) -> str:
    """What changes when a file of the source does, read off names, sizes and times."""
    digest = hashlib.sha256()
    for path in chain.from_iterable((path, *_sidecars(path)) for path in files):
        try:
            state = path.stat()
        except OSError:
            continue
        digest.update(os.fsencode(path.relative_to(source.parent)))
        digest.update(f"\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _sidecars(picture: Path) -> tuple[Path, Path]:
    return picture.with_suffix(".txt"), picture.with_suffix(".json")


def _samples(source: Path, files: Sequence[Path]) -> Iterator[Sample]:
    """Every picture of a source with what lies beside it."""
    for path in files:
        if path.suffix.lower() == ".tar":
            yield from _of_shard(path)
        else:
            yield path.relative_to(source).as_posix(), _of_folder(path)


def _of_folder(picture: Path) -> Parts | LdmError:
    try:
        beside = {path.suffix[1:]: read_file(path, MAX_CAPTION_BYTES) for path in _sidecars(picture) if path.exists()}
        return {picture.suffix[1:].lower(): read_file(picture, LARGE_BYTES), **beside}
    except LdmError as error:
        return error


def _of_shard(path: Path) -> Iterator[Sample]:
    """The samples of one tar; one that is broken gives what stands before the break, and one fault.

    Of two files of one name the second is a fault.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    twice: list[str] = []

    def noted(error: Exception) -> bool:
        twice.append(str(error.args[0]).partition(": duplicate")[0])
        return True  # go on

    try:
        with path.open("rb") as stream:
            for parts in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]), handler=noted):
                yield f"{path.name}/{parts['__key__']}", parts
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
        yield path.name, LdmError(f"{path.name}: not a whole tar ({reason}); copy the shard again")
    for name in twice:
        yield f"{path.name}/{name}", LdmError("is there twice; the first one is used")


def _decoded(samples: Iterator[Sample], fit: Fit, faults: list[str]) -> Iterator[tuple[np.ndarray, Record]]:
    """Squares and their records, decoded side by side; one line for each sample that has none goes to `faults`."""

    def decode(sample: Sample) -> tuple[np.ndarray, Record] | LdmError:
        name, parts = sample
        try:
            if isinstance(parts, LdmError):
                raise parts
            return _pixels(parts, fit), {"key": name, "texts": _captions(parts)}
        except LdmError as error:
            return error

    with ThreadPoolExecutor() as pool:
        while batch := list(islice(samples, 64)):
            for (name, _), result in zip(batch, pool.map(decode, batch), strict=True):
                if isinstance(result, LdmError):
                    faults.append(printable(f"{name}: {str(result).removeprefix(f'{name}: ')}"))
                else:
                    yield result


def _pixels(parts: Parts, fit: Fit) -> np.ndarray:
    """The picture of a sample as uint8 (size, size, 3)."""
    data = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
    if data is None:
        raise LdmError(f"no picture, expected {', '.join(SUFFIXES)}")
    image = read_shrunk(data, fit.size)
    size, short = fit.size, min(image.size)
    shape = (size, size) if fit.resize == "squash" else tuple(max(size, int(size * s / short)) for s in image.size)
    if max(shape) > 64 * size:
        raise LdmError(f"image: found {image.width}x{image.height}, too narrow; cut it")
    image = image.resize((shape[0], shape[1]), Image.Resampling[fit.resample.upper()])
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _captions(parts: Parts) -> list[str]:
    """A sample's captions: the lines of its txt, or what its json has of them."""
    try:
        if "txt" in parts:
            texts = parts["txt"].decode("utf-8-sig").splitlines()
        else:
            record = json.loads(parts.get("json", b"null"))
            found = [record[field] for field in CAPTION_FIELDS if field in record] if isinstance(record, dict) else []
            texts = next((value if isinstance(value, list) else [value] for value in found), [])
    except (ValueError, RecursionError) as error:
        raise LdmError(f"its caption cannot be read ({error})") from None
    kept = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not kept:
        raise LdmError("no caption, expected one in a .txt or .json of the same name")
    return kept


def _report(faults: Sequence[str], good: int, path: Path) -> None:
    """Say how many pictures there are, and which were left out."""
    for line in faults[:NAMED]:
        log.warning("left out  %s", line)
    more = f"; all of them in {path}" if len(faults) > NAMED else ""
    log.info("%d pictures, %d left out%s", good, len(faults), more)
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in faults).encode("utf-8", "replace"))

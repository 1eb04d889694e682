"""An index made, resumed and brought up to date: what changed is embedded in saved pieces, then all becomes one table.

Whatever is killed, at any time: the record on disk names whole files, and every piece that was saved is found again.
The table is ordered by path, so an index that followed its folder equals one that is made anew.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ldm.errors import LdmError
from ldm.pipeline.clip.model import CLIP
from ldm.pipeline.files import reason
from ldm.search import nearest
from ldm.search.embed import embed
from ldm.search.scan import Bad, scan
from ldm.search.store import (
    RECORD,
    REPORT,
    Nearest,
    Record,
    check_maker,
    folder_as_written,
    folder_of,
    maker_of,
    new_path,
    pieces,
    read_record,
    read_table,
    tidy,
    write_json,
    write_record,
)
from ldm.search.table import (
    ENTRY,
    Found,
    Listing,
    Picture,
    empty_vectors,
    listing_of,
    read_piece,
    write_array,
    write_piece,
)
from ldm.weights.atomic import replacing
from ldm.weights.io import printable
from ldm.weights.lock import locked

Progress = Callable[[str, float], None]
"""What is being done, and the share of it that is."""


@dataclass(frozen=True)
class Share:
    """The pictures that one of several processes embeds. number: 1 ... of"""

    number: int = 1
    of: int = 1

    def has(self, found: Found) -> bool:
        """Whether a picture is among them; by its path alone, so that a growing folder moves none."""
        return zlib.crc32(os.fsencode(found.path)) % self.of == self.number - 1


@dataclass(frozen=True)
class Report:
    """What a run did. embedded: pictures that the CLIP saw; pictures: that the index holds now; None: not this run."""

    embedded: int
    bad: list[Bad]
    pictures: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    nearest: Nearest | None = None


@dataclass(frozen=True)
class _Have:
    """All vectors on disk: of the table, if there is one, and of the pieces. places: file -> (0 or number, row)."""

    table: tuple[Listing, np.ndarray] | None
    parts: list[Path]
    places: dict[Found, tuple[int, int]]


def _nothing(_text: str, _share: float) -> None:
    """No progress is shown."""


def update(
    folder: Path,
    index: Path,
    clip: CLIP,
    *,
    rebuild: bool = False,
    texts: Sequence[str] = (),
    exact_up_to: int = nearest.EXACT_UP_TO,
    progress: Progress = _nothing,
    share: Share | None = None,
    meet: Callable[[], None] = lambda: None,
) -> Report:
    """Make an index of all pictures below a folder, or bring it up to date; what a killed run saved is used.

    rebuild:     forget all that was there
    texts:       queries that an approximate index is tried with, besides pictures
    exact_up_to: pictures beyond which there is one
    share, meet: where other processes embed other shares at the same time (`update_share`): ours, and what waits
    for them all; it is called before and after.

    Raises `LdmError` for a folder without a readable picture, another CLIP's or folder's index, a damaged one.
    """
    _create(index)
    with locked(index, "--index"):
        record = _begin(folder, index, clip, rebuild)
        meet()
        embedded = 0
        if share is not None:
            embedded = _embed_missing(folder, index, clip, record, share, progress)[1].embedded
            meet()
        files, rest = _embed_missing(folder, index, clip, record, Share(), progress)
        report = _merge(folder, index, clip, record, files, rest, texts, exact_up_to, progress)
    return replace(report, embedded=report.embedded + embedded)


def update_share(
    folder: Path,
    index: Path,
    clip: CLIP,
    share: Share,
    *,
    progress: Progress = _nothing,
    meet: Callable[[], None] | None = None,
) -> Report:
    """Embed a share of what is missing, and leave the rest to others: `update` in the end makes the index of it all.

    meet: as with `update`, which then runs beside and holds the lock; None: it runs later
    """
    if meet is not None:
        meet()
        record = read_record(index)
        assert record is not None  # `update` has written it before it met us
        _, report = _embed_missing(folder, index, clip, record, share, progress)
        meet()
        return report
    _create(index)
    with locked(index, "--index", shared=True):
        record = _record(folder, index, clip)
        return _embed_missing(folder, index, clip, record, share, progress)[1]


def _create(index: Path) -> None:
    try:
        index.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(
            f"{printable(str(index))}: cannot be made ({reason(error)}); choose another place with --index"
        ) from None


def _begin(folder: Path, index: Path, clip: CLIP, rebuild: bool) -> Record:
    """The record to start from. What nobody needs any more is removed."""
    before = None if rebuild else read_record(index)
    if rebuild:
        (index / RECORD).unlink(missing_ok=True)
    if before is None:
        tidy(index, None, keep_pieces=False)
    record = _record(folder, index, clip)
    tidy(index, record, keep_pieces=True)
    return record


def _record(folder: Path, index: Path, clip: CLIP) -> Record:
    """The record of an index; a new one is begun where there is none. Raises `LdmError` where it is another's."""
    record = read_record(index)
    if record is None:
        record = Record(clip=maker_of(clip), folder=folder_as_written(folder, index))
        write_record(index, record)
    if folder_of(index, record).resolve() != folder.resolve():
        raise LdmError(
            f"{printable(str(index))}: is the index of {printable(str(folder_of(index, record)))}, found"
            f" {printable(str(folder))}; choose another place with --index, or add --rebuild"
        )
    check_maker(index, record, clip)
    return record


def _have(index: Path, record: Record) -> _Have:
    table = read_table(index, record) if record.files else None
    parts = pieces(index)
    places: dict[Found, tuple[int, int]] = {}
    for number, path in enumerate(parts, start=1):
        piece = read_piece(path, record.clip.identity, record.clip.width)
        for row, picture in enumerate(piece[0].pictures() if piece else ()):
            places[picture.found] = (number, row)
    for row, picture in enumerate(table[0].pictures() if table else ()):
        places[picture.found] = (0, row)
    return _Have(table, parts, places)


def _embed_missing(
    folder: Path, index: Path, clip: CLIP, record: Record, share: Share, progress: Progress
) -> tuple[list[Found], Report]:
    """Embed what the folder holds and the index lacks, a piece for each batch; all files that the folder holds."""
    progress("looking", 0.0)
    files, bad = scan(folder, index)
    if not files:
        raise LdmError(f"{printable(str(folder))}: holds no pictures; expected .png, .jpg, .jpeg or .webp files")
    have = _have(index, record)
    todo = [found for found in files if found not in have.places and share.has(found)]
    hashes: dict[bytes, int] = {}
    if have.table and todo:
        hashes = {picture.hash: row for row, picture in enumerate(have.table[0].pictures())}

    def known(digest: bytes) -> np.ndarray | None:
        row = hashes.get(digest)
        return have.table[1][row] if have.table and row is not None else None

    embedded = done = 0
    for batch in embed(clip, folder, todo, known):
        bad += batch.bad
        if batch.pictures:
            path = new_path(index, "piece", ".npz")
            write_piece(path, clip.identity, listing_of(batch.pictures), batch.vectors)
        embedded += batch.seen
        done += len(batch.pictures) + len(batch.bad)
        progress(f"embedding {done} of {len(todo)} pictures", done / len(todo))
    return files, Report(embedded, bad)


def _merge(
    folder: Path,
    index: Path,
    clip: CLIP,
    record: Record,
    listed: Sequence[Found],
    done: Report,
    texts: Sequence[str],
    exact_up_to: int,
    progress: Progress,
) -> Report:
    """Make one table of all that is there, and an approximate index where it is large."""
    progress("writing the index", 0.0)
    have = _have(index, record)
    files = [found for found in listed if found in have.places]
    write_json(index / REPORT, {"pictures": len(files), "bad": [asdict(bad) for bad in done.bad]})
    if not files:
        first = done.bad[0]
        raise LdmError(
            f"{printable(str(folder))}: none of {len(done.bad)} pictures can be read, as {printable(first.path)}:"
            f" {printable(first.reason)}; {printable(str(index / REPORT))} names them all"
        )
    before = list(have.table[0].pictures()) if have.table else []
    if [picture.found for picture in before] != files:
        pictures, vectors, written = _write_table(index, clip, files, have)
        found, search = _make_searchable(index, clip, vectors, texts, exact_up_to, progress)
        sizes = {path.name: path.stat().st_size for path in [*written, *search]}
        record = replace(record, pictures=len(files), files=sizes, nearest=found)
        write_record(index, record)
    else:
        pictures = before
    tidy(index, record, keep_pieces=False)
    old = {picture.found.path: picture.hash for picture in before}
    new = {picture.found.path: picture.hash for picture in pictures}
    return replace(
        done,
        pictures=len(files),
        added=len(new.keys() - old.keys()),
        changed=sum(old.get(path, digest) != digest for path, digest in new.items()),
        removed=len(old.keys() - new.keys()),
        nearest=record.nearest,
    )


def _write_table(
    index: Path, clip: CLIP, files: Sequence[Found], have: _Have
) -> tuple[list[Picture], np.ndarray, list[Path]]:
    """The table of these files under new names: its pictures, its vectors (N, P), and what was written."""
    paths = [new_path(index, kind, ".npy") for kind in ("entries", "paths", "vectors")]
    places = np.array([have.places[found] for found in files])
    hashes = np.zeros(len(files), ENTRY["hash"])
    try:
        vectors = empty_vectors(paths[2], len(files), clip.width)
        for number in np.unique(places[:, 0]):
            listing, source = _part(have, int(number), clip)
            rows = np.flatnonzero(places[:, 0] == number)
            vectors[rows], hashes[rows] = source[places[rows, 1]], listing.entries["hash"][places[rows, 1]]
        vectors.flush()
        pictures = [Picture(found, digest) for found, digest in zip(files, hashes.tolist(), strict=True)]
        listing = listing_of(pictures)
        write_array(paths[0], listing.entries)
        write_array(paths[1], listing.paths)
    except OSError as error:
        raise LdmError(f"{printable(str(index))}: cannot be written ({reason(error)}); make room") from None
    return pictures, vectors, paths


def _part(have: _Have, number: int, clip: CLIP) -> tuple[Listing, np.ndarray]:
    """The table, number 0, or a piece."""
    part = have.table if number == 0 else read_piece(have.parts[number - 1], clip.identity, clip.width)
    if part is None:
        raise LdmError(f"{printable(str(have.parts[number - 1]))}: was damaged while it was read; try again")
    return part


def _make_searchable(
    index: Path, clip: CLIP, vectors: np.ndarray, texts: Sequence[str], exact_up_to: int, progress: Progress
) -> tuple[Nearest, list[Path]]:
    """Build and tune an approximate index, if there are many vectors (N, P): what it is, and the file it went to."""
    if len(vectors) <= exact_up_to:
        return Nearest(), []
    progress(f"training an index of {len(vectors)} pictures", 0.0)
    kind = nearest.kind_for(len(vectors), clip.width, nearest.memory_bytes())
    built = nearest.train(vectors, kind)
    spoken = clip.text_vectors(texts).numpy() if texts else None
    probes, recall = nearest.tune(built, vectors, nearest.sample_queries(vectors, spoken))
    path = new_path(index, "nearest", ".faiss")
    with replacing(path) as file:
        nearest.write(built, file)
    return Nearest(kind, probes, nearest.TARGET, recall), [path]

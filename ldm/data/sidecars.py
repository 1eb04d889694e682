"""A folder of pictures with their captions beside them, or in tables, or in tar shards and Parquet
files.

`x.png` has its caption in `x.txt`, `x.caption` or `x.json`: of a text file the first line, or with wildcards any one of
its lines, as in kohya's sd-scripts. A table (see imagefolder.py) comes before that. `x-masklabel.png` is its mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.data.caption_files import read_captions
from ldm.data.example import Defaults, Example, PictureSet, example_of
from ldm.data.file_at import FileAt
from ldm.data.imagefolder import TABLES, Row, Told, read_tables
from ldm.data.listing import (
    CAPTIONS,
    MASK_ENDING,
    OTHER_PICTURES,
    PICTURES,
    Listing,
    is_clutter,
    list_files,
    some,
)
from ldm.data.parquet_pictures import read_parquet
from ldm.data.tar_members import read_shard
from ldm.errors import LdmError, printable

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
"""Folders of which usually one alone is trained on."""

Aside = Mapping[str, Path] | None
"""Pictures of a folder of masks or hints, by their name without its ending; None where there is no such folder."""


@dataclass(frozen=True)
class Beside:
    """What is known of a folder's pictures.

    captions: caption files, by the path without its ending, in the order of CAPTIONS
    told: what tables say
    masks: files x-masklabel.png, by the path of x without its ending
    more_masks, hints: those of a folder of their own
    """

    captions: Mapping[Path, tuple[Path, ...]]
    told: Told
    masks: Mapping[Path, Path]
    more_masks: Aside
    hints: Aside


def read_folder(
    folder: Path, defaults: Defaults, *, deep: bool = True, told: Told | None = None, prefix: str = ""
) -> PictureSet:
    """The pictures of a folder, and with `deep` of the folders in it.

    told: what another table says of them
    prefix: stands before their names

    Raises LdmError where the folder cannot be read.
    """
    aside = [path for path in (defaults.masks, defaults.hints) if path is not None]
    listing = list_files(folder, deep=deep, without=aside)
    told = told or read_tables(listing)
    beside = _beside(listing, defaults, told)
    helpers = {*beside.masks.values(), *(path for row in told.rows.values() for path in (row.mask, row.hint) if path)}
    examples: list[Example] = []
    left_out = list(told.left_out)
    notes: list[str] = []
    for path in listing.files:
        suffix, name = path.suffix.lower(), printable(prefix + listing.name(path))
        if is_clutter(path):
            left_out.append(f"{name}: put there by macOS, no picture or caption")
        elif suffix == ".tar" or (suffix == ".parquet" and path.name not in TABLES):
            shard = (read_shard if suffix == ".tar" else read_parquet)(path, name, defaults)
            examples += shard.examples
            left_out += shard.left_out
        elif suffix in OTHER_PICTURES:
            left_out.append(f"{name}: a {suffix} picture, expected PNG, JPEG or WebP; convert it")
        elif suffix in PICTURES and path not in helpers:
            try:
                examples.append(_example(path, listing, name, defaults, beside))
            except LdmError as error:
                left_out.append(f"{name}: {error}")
    left_out += (f"{prefix}{line}" for line in _without_picture(listing, beside))
    notes += _notes(listing, examples, defaults, beside)
    return PictureSet(folder, tuple(examples), tuple(left_out), tuple(notes))


def _beside(listing: Listing, defaults: Defaults, told: Told) -> Beside:
    wanted = (defaults.caption_suffix.lower(),) if defaults.caption_suffix else CAPTIONS
    captions: dict[Path, tuple[Path, ...]] = {}
    masks: dict[Path, Path] = {}
    for path in listing.files:
        stem, suffix = path.with_suffix(""), path.suffix.lower()
        if is_clutter(path):
            continue
        if suffix in wanted:
            both = (*captions.get(stem, ()), path)
            captions[stem] = tuple(sorted(both, key=lambda path: wanted.index(path.suffix.lower())))
        elif suffix in PICTURES and stem.name.endswith(MASK_ENDING):
            masks[stem.with_name(stem.name.removesuffix(MASK_ENDING))] = path
    return Beside(captions, told, masks, _aside(defaults.masks), _aside(defaults.hints))


def _aside(folder: Path | None) -> Aside:
    if folder is None:
        return None
    listing = list_files(folder)
    pictures = [path for path in listing.files if path.suffix.lower() in PICTURES and not is_clutter(path)]
    return {listing.name(path.with_suffix("")): path for path in pictures}


def _example(path: Path, listing: Listing, name: str, defaults: Defaults, beside: Beside) -> Example:
    """Raises LdmError, without the picture's name, where it cannot be taken."""
    row = beside.told.rows.get(path, Row())
    stem, inner = path.with_suffix(""), listing.name(path.with_suffix(""))
    captions = row.captions
    if not captions and (files := beside.captions.get(stem)):
        captions = read_captions(files[0].suffix.lower(), FileAt(files[0]), lines=defaults.rules.wildcards)
    mask = row.mask or beside.masks.get(stem) or (beside.more_masks or {}).get(inner)
    hint = row.hint or (beside.hints or {}).get(inner)
    for helper in filter(None, (row.mask, row.hint)):
        if not helper.is_file():
            raise LdmError(f"{printable(helper.name)}, which its row names, is not there; add it or mend the row")
    if hint is None and beside.hints is not None:
        raise LdmError(f"no picture {printable(inner)} in {printable(str(defaults.hints))}; add it")
    return example_of(name, FileAt(path), captions, defaults, mask=_at(mask), hint=_at(hint))


def _at(path: Path | None) -> FileAt | None:
    return None if path is None else FileAt(path)


def _without_picture(listing: Listing, beside: Beside) -> list[str]:
    """A line for each row, caption and mask that belongs to nothing, and for captions that another one outranks."""
    pictures = {path.with_suffix("") for path in listing.files if path.suffix.lower() in PICTURES}
    present = set(listing.files)
    lines = [
        f"{printable(listing.name(path))}: not found, though a table names it; add it or mend the table"
        for path in beside.told.rows
        if path not in present
    ]
    others = {path.with_suffix("") for path in listing.files if path.suffix.lower() in OTHER_PICTURES}
    for stem, files in beside.captions.items():
        for path in files if stem not in pictures else files[1:]:
            if path.suffix.lower() == ".json" or stem in others:
                continue  # a settings file or the like; or the picture is named already
            why = "no picture of this name" if stem not in pictures else f"not read, {files[0].name} comes before it"
            lines.append(f"{printable(listing.name(path))}: {why}")
    for stem, path in beside.masks.items():
        if stem not in pictures:
            lines.append(f"{printable(listing.name(path))}: a mask, but no picture of its name")
    return lines


def _notes(listing: Listing, examples: list[Example], defaults: Defaults, beside: Beside) -> list[str]:
    known = {*PICTURES, *OTHER_PICTURES, *CAPTIONS, ".tar", defaults.caption_suffix.lower() or ".txt"}
    rest = [listing.name(path) for path in listing.files if path.suffix.lower() not in known and not is_clutter(path)]
    rest = [name for name in rest if listing.folder / name not in beside.told.tables]
    notes = []
    if len(splits := [name for name in SPLITS if (listing.folder / name).is_dir()]) > 1:
        notes.append(f"all of {', '.join(splits)} is taken; give one of these folders to take it alone")
    if rest:
        notes.append(f"not read, for they are no pictures or captions: {some(rest)}")
    if listing.passed_by:
        notes.append(f"hidden folders were not looked into: {some([listing.name(path) for path in listing.passed_by])}")
    if beside.more_masks is not None and (bare := [example.name for example in examples if example.mask is None]):
        notes.append(f"without a mask, so that the whole picture counts: {some(bare)}")
    if defaults.flip and (one_sided := [example.name for example in examples if not example.flip]):
        notes.append(f"never mirrored, for what their captions say: {some(one_sided)}")
    return notes

"""WebDataset shards, read where they lie: a tar is looked through once, and each member is then bytes at an offset.

Files that share their path up to the first dot of the base name are one sample: `a/x.jpg` with `a/x.txt` or `a/x.json`,
and maybe `a/x.mask.png`, or `a/x.hint.png` for a ControlNet.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ldm.data.caption_files import read_captions
from ldm.data.example import Defaults, Example, PictureSet, example_of
from ldm.data.file_at import FileAt
from ldm.data.listing import CAPTIONS, OTHER_PICTURES, PICTURES, is_clutter
from ldm.data.shards import ends_like_a_tar
from ldm.errors import LdmError, printable

Parts = dict[str, FileAt]
"""The files of a sample, by what follows the first dot, with that dot, in small letters."""


def read_shard(path: Path, name: str, defaults: Defaults) -> PictureSet:
    """The samples of one tar; `name` stands before theirs. A tar that is cut short gives those before the cut."""
    examples: list[Example] = []
    left_out: list[str] = []
    samples, faults = index_tar(path)
    for key, parts in samples.items():
        inner = printable(f"{name}/{key}")
        try:
            if (example := _example(inner, parts, defaults)) is not None:
                examples.append(example)
        except LdmError as error:
            left_out.append(f"{inner}: {error}")
    return PictureSet(path, tuple(examples), (*left_out, *(f"{name}{fault}" for fault in faults)))


def index_tar(path: Path) -> tuple[Mapping[str, Parts], list[str]]:
    """Where the files of each sample lie, and a line for each fault of the tar."""
    samples: dict[str, Parts] = {}
    faults: list[str] = []
    try:
        for member in _members(path):
            key, suffix = _split(member.name)
            if not member.isreg():
                if not member.isdir():
                    faults.append(f"/{printable(member.name)}: a link or device, expected a file")
            elif is_clutter(Path(member.name)):
                faults.append(f"/{printable(member.name)}: put there by macOS, no picture or caption")
            elif suffix in samples.setdefault(key, {}):
                faults.append(f"/{printable(member.name)}: there is another of this name before it")
            else:
                samples[key][suffix] = FileAt(path, member.offset_data, member.size)
        if not ends_like_a_tar(path):
            faults.append(": incomplete, does not end as a tar does; copy the shard again")
    except (tarfile.TarError, OSError, ValueError) as error:
        faults.append(f": not a whole tar, unpacked ({printable(str(error).lower())[:80]}); copy the shard again")
    return {key: parts for key, parts in samples.items() if parts}, faults


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members that lie in the file with all their bytes."""
    size = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg() and member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} ends beyond the file's end")
            yield member


def _split(name: str) -> tuple[str, str]:
    """ "a/x.mask.png" -> ("a/x", ".mask.png")."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _example(name: str, parts: Parts, defaults: Defaults) -> Example | None:
    """A sample as an example, None where it has nothing to do with pictures. Raises LdmError where it is no use."""
    image = _first(parts, "")
    if image is None:
        found = sorted(parts)
        if foreign := [suffix for suffix in found if suffix in OTHER_PICTURES]:
            raise LdmError(f"a {foreign[0]} picture, expected PNG, JPEG or WebP; convert it")
        if any(suffix in CAPTIONS for suffix in found):
            raise LdmError(f"no picture beside {printable(', '.join(found))[:80]}; add it or remove the sample")
        return None
    wanted = (defaults.caption_suffix.lower(),) if defaults.caption_suffix else CAPTIONS
    suffix = next((suffix for suffix in wanted if suffix in parts), None)
    captions = read_captions(suffix, parts[suffix], lines=defaults.rules.wildcards) if suffix else ()
    return example_of(name, image, captions, defaults, mask=_first(parts, ".mask"), hint=_first(parts, ".hint"))


def _first(parts: Parts, kind: str) -> FileAt | None:
    return next((parts[kind + suffix] for suffix in PICTURES if kind + suffix in parts), None)

"""What lies in a folder, by what its endings say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import LdmError, printable

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""What is read. The content decides in the end: a wrong ending is found when the picture is decoded."""

OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".heif", ".jfif", ".svg", ".psd")
"""Pictures that are named where they are left out."""

CAPTIONS = (".txt", ".caption", ".json")
"""Captions beside a picture; of several the first."""

MASK_ENDING = "-masklabel"
"""x-masklabel.png is the mask of x (OneTrainer)."""

SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """files: all, in the order of their names; passed_by: hidden folders, which nobody looked into."""

    folder: Path
    files: tuple[Path, ...]
    passed_by: tuple[Path, ...] = ()

    def name(self, path: Path) -> str:
        """What a file in it is called."""
        return path.relative_to(self.folder).as_posix()


def list_files(folder: Path, *, deep: bool = True, without: Sequence[Path] = ()) -> Listing:
    """The plain files of a folder, and with `deep` of all folders in it, except of those `without`.

    Links are followed, but no folder is entered twice. Raises LdmError for what is no folder, or may not be read.
    """
    if not folder.is_dir():
        raise LdmError(f"{printable(str(folder))}: not found, expected a folder of pictures; check the path")
    passed_by: list[Path] = []
    seen = {path.resolve() for path in without}
    try:
        files = tuple(sorted(_walk(folder, deep, seen, passed_by), key=lambda path: path.relative_to(folder).parts))
    except OSError as error:
        where = printable(str(error.filename or folder))
        raise LdmError(
            f"{where}: cannot be read ({(error.strerror or str(error)).lower()}); check its rights"
        ) from None
    return Listing(folder, files, tuple(sorted(passed_by)))


def _walk(folder: Path, deep: bool, seen: set[Path], passed_by: list[Path]) -> Iterator[Path]:
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.is_file():
                yield path
            elif deep and entry.is_dir():
                if entry.name.startswith("."):
                    passed_by.append(path)
                else:
                    yield from _walk(path, deep, seen, passed_by)


def is_clutter(path: Path) -> bool:
    """Whether macOS put it there beside the real file, under the same name."""
    return path.name.startswith("._") or "__MACOSX" in path.parts


def some(names: Sequence[str]) -> str:
    """The first names, printable, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + rest

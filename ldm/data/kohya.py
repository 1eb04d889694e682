"""The folders of kohya's sd-scripts: `10_sks dog` is shown ten times an epoch, and "sks dog" where there is no caption.

A folder `reg_1_dog` beside them, or any `reg_...`, holds pictures of the class (there, they lie in a folder of their
own, with names of the same kind).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.data.example import Defaults, PictureSet, joined
from ldm.data.listing import PICTURES, is_clutter, some
from ldm.data.sidecars import read_folder
from ldm.errors import printable

_CONCEPT = re.compile(r"(?P<repeats>\d{1,6})_(?P<tokens>.+)", re.ASCII)
_REGULAR = re.compile(r"reg_(?:(?P<repeats>\d{1,6})_)?(?P<tokens>.+)", re.ASCII)


@dataclass(frozen=True)
class Concept:
    """A folder of one thing."""

    folder: Path
    repeats: int
    tokens: str
    regular: bool


def concepts_in(folder: Path) -> tuple[Concept, ...]:
    """The concepts of a folder; none where no folder in it is named with its repeats."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        named, regular = _CONCEPT.fullmatch(path.name), _REGULAR.fullmatch(path.name)
        if name := named or regular:
            found.append(Concept(path, int(name["repeats"] or 1), name["tokens"], regular is not None))
    return tuple(found) if any(not concept.regular for concept in found) else ()


def read_concepts(folder: Path, concepts: tuple[Concept, ...], defaults: Defaults) -> PictureSet:
    """The pictures of these folders, and a line for each other folder, and for each picture in none."""
    parts, notes = [], []
    for concept in concepts:
        name = printable(concept.folder.name)
        if concept.repeats == 0:
            parts.append(PictureSet(folder, (), (f"{name}: its pictures are to be shown 0 times; give it a number",)))
            continue
        own = replace(defaults, repeats=concept.repeats * defaults.repeats, class_tokens=concept.tokens)
        part = read_folder(concept.folder, own, prefix=f"{concept.folder.name}/")
        examples = tuple(replace(example, regular=concept.regular) for example in part.examples)
        what = " of the class" if concept.regular else ""
        tokens = printable(concept.tokens)
        shown = f"shown {own.repeats} times an epoch, '{tokens}' where there is no caption"
        notes.append(f"{name}: {shown}; pictures{what}: {len(examples)}")
        parts.append(replace(part, examples=examples))
    known = {concept.folder for concept in concepts}
    others = [path for path in sorted(folder.iterdir()) if path not in known]
    left_out = [
        f"{printable(path.name)}: lies in none of the folders named with their repeats; move it into one"
        for path in others
        if path.is_file() and path.suffix.lower() in PICTURES and not is_clutter(path)
    ]
    if folders := [path.name for path in others if path.is_dir() and not path.name.startswith(".")]:
        notes.append(f"folders that are not named as 10_sks dog are not read: {some(folders)}")
    return joined(folder, (*parts, PictureSet(folder, (), tuple(left_out), tuple(notes))))

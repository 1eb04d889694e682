"""A set of pictures to train on, whichever way it is laid out. Nothing is dropped without a line about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ldm.data.example import Defaults, Example, PictureSet, joined
from ldm.data.imagefolder import TABLES
from ldm.data.kohya import concepts_in, read_concepts
from ldm.data.kohya_toml import read_dataset_toml
from ldm.data.parquet_pictures import read_parquet
from ldm.data.sidecars import read_folder
from ldm.data.tar_members import read_shard
from ldm.errors import LdmError, printable

__all__ = ["Defaults", "Example", "PictureSet", "read_pictures"]


def read_pictures(path: Path, defaults: Defaults | None = None) -> PictureSet:
    """Find the pictures of a folder, a .tar shard, a .parquet file or a kohya .toml, with their captions.

    A folder may hold, in any depth: pictures with caption files beside them, Hugging Face's metadata tables,
    WebDataset shards, and Parquet files with the pictures in them; or kohya's folders `10_sks dog`. Pictures are not
    decoded here.

    Raises LdmError where nothing is found that can be used.
    """
    defaults = defaults or Defaults()
    found = _read(path, defaults)
    if defaults.regular is not None:
        of_class = replace(defaults, class_tokens=defaults.regular_tokens, masks=None, hints=None)
        part = _read(defaults.regular, of_class)
        found = joined(path, (found, replace(part, examples=tuple(replace(e, regular=True) for e in part.examples))))
    if all(example.regular for example in found.examples):
        raise nothing_left(found)
    return found


def nothing_left(pictures: PictureSet) -> LdmError:
    """What to say where no picture of a set can be used."""
    where = printable(str(pictures.root))
    if not pictures.left_out:
        return LdmError(f"{where}: holds no pictures, expected PNG, JPEG or WebP files, or .tar shards of them")
    count = len(pictures.left_out)
    return LdmError(f"{where}: holds no picture that can be used; {count} left out, as {pictures.left_out[0]}")


def _read(path: Path, defaults: Defaults) -> PictureSet:
    if path.is_dir():
        concepts = concepts_in(path)
        return read_concepts(path, concepts, defaults) if concepts else read_folder(path, defaults)
    if not path.is_file():
        raise LdmError(f"{printable(str(path))}: not found, expected a folder of pictures; check the path")
    if path.name in TABLES:
        return read_folder(path.parent, defaults)
    match path.suffix.lower():
        case ".tar":
            return read_shard(path, printable(path.name), defaults)
        case ".parquet":
            return read_parquet(path, printable(path.name), defaults)
        case ".toml":
            return read_dataset_toml(path, defaults)
    raise LdmError(f"{printable(str(path))}: expected a folder, a .tar shard, a .parquet file or a kohya .toml")

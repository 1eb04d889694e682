"""The data set files of kohya's sd-scripts (`--dataset_config`).

A key of a subset comes before its data set's, that before `[general]`'s, and that before the defaults.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from ldm.data.caption_files import captions_in
from ldm.data.captions import CaptionRules
from ldm.data.example import Defaults, PictureSet, joined
from ldm.data.file_at import FileAt
from ldm.data.imagefolder import MAX_BYTES, Row, Told
from ldm.data.listing import PICTURES, list_files
from ldm.data.sidecars import read_folder
from ldm.errors import LdmError, printable

_NUMBER = (int, float)
RULES: Mapping[str, tuple[str, type | tuple[type, ...]]] = {
    "shuffle_caption": ("shuffle", bool),
    "keep_tokens": ("keep", int),
    "caption_separator": ("separator", str),
    "caption_prefix": ("prefix", str),
    "caption_suffix": ("suffix", str),
    "caption_dropout_rate": ("drop", _NUMBER),
    "caption_tag_dropout_rate": ("drop_tags", _NUMBER),
    "enable_wildcard": ("wildcards", bool),
}
"""Keys that are caption rules of ours, and what they hold."""

SETTINGS: Mapping[str, tuple[str, type | tuple[type, ...]]] = {
    "num_repeats": ("repeats", int),
    "flip_aug": ("flip", bool),
    "random_crop": ("random_crop", bool),
    "class_tokens": ("class_tokens", str),
    "caption_extension": ("caption_suffix", str),
}
OF_SUBSET: Mapping[str, type] = {"image_dir": str, "is_reg": bool, "metadata_file": str, "conditioning_data_dir": str}
HELD = {key: held for key, (_, held) in {**RULES, **SETTINGS}.items()}

ELSEWHERE = (
    "resolution", "batch_size", "enable_bucket", "bucket_no_upscale", "bucket_reso_steps", "min_bucket_reso",
    "max_bucket_reso",
)  # fmt: skip
NOT_HERE = (
    "color_aug", "face_crop_aug_range", "keep_tokens_separator", "secondary_separator", "token_warmup_min",
    "token_warmup_step", "caption_dropout_every_n_epochs", "cache_info", "network_multiplier", "validation_split",
    "validation_seed", "alpha_mask", "custom_attributes", "resize_interpolation", "skip_image_resolution",
)  # fmt: skip
"""Keys that are known and have no effect; the first kind is said by options of the command."""

Values = Mapping[str, Any]


def read_dataset_toml(path: Path, defaults: Defaults) -> PictureSet:
    """The pictures of all its subsets. A relative folder is looked for beside the file, then in the current folder.

    Raises LdmError for a file that is no such TOML, an unknown key, and a value of the wrong kind.
    """
    try:
        said = tomllib.loads(FileAt(path).read(MAX_BYTES).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LdmError(f"{printable(str(path))}: is not TOML ({printable(str(error))[:80]}); mend it") from None
    where = printable(path.name)
    if unknown := sorted(set(said) - {"general", "datasets"}):
        raise LdmError(f"{where}: {printable(unknown[0])} is unknown; known are general, datasets")
    general = _checked(said.get("general", {}), f"{where}: general", ())
    parts, unused = [], set(general)
    for number, dataset in enumerate(_tables(said.get("datasets"), f"{where}: datasets"), 1):
        place = f"{where}: datasets {number}"
        common = {**general, **_checked(dataset, place, ("subsets",))}
        for index, subset in enumerate(_tables(dataset.get("subsets"), f"{place}, subsets"), 1):
            values = {**common, **_checked(subset, f"{place}, subset {index}", tuple(OF_SUBSET))}
            unused |= set(values)
            parts.append(_subset(values, path.parent, f"{place}, subset {index}", defaults))
    notes = []
    if found := [key for key in ELSEWHERE if key in unused]:
        notes.append(f"{where}: {', '.join(found)} are not taken from it, but from the options of the command")
    if found := [key for key in NOT_HERE if key in unused]:
        notes.append(f"{where}: without effect here: {', '.join(found)}")
    return joined(path, (*parts, PictureSet(path, (), (), tuple(notes))))


def _tables(value: object, where: str) -> list[Values]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise LdmError(f"{where}: expected one [[...]] table or more")
    return value


def _checked(values: object, where: str, more: tuple[str, ...]) -> dict[str, Any]:
    """The values, of a known kind each. more: keys that are known here besides."""
    if not isinstance(values, dict):
        raise LdmError(f"{where}: is {printable(repr(values)[:40])}, expected a table")
    known = (*HELD, *ELSEWHERE, *NOT_HERE, *more)
    for key, value in values.items():
        if key not in known:
            raise LdmError(f"{where}: {printable(key)} is unknown; known are {', '.join(known)}")
        held = HELD.get(key) or OF_SUBSET.get(key)
        if held and (not isinstance(value, held) or (isinstance(value, bool) and held is not bool)):
            expected = getattr(held, "__name__", "number")
            raise LdmError(f"{where}: {key} is {printable(repr(value)[:40])}, expected {expected}")
    return {key: value for key, value in values.items() if key != "subsets"}


def _subset(values: Values, beside: Path, where: str, defaults: Defaults) -> PictureSet:
    if values.get("num_repeats", 1) < 1:
        raise LdmError(f"{where}: num_repeats is {values['num_repeats']}, expected 1 or more")
    if "image_dir" not in values:
        raise LdmError(f"{where}: image_dir is missing, expected the folder of the pictures")
    rules = {ours: values[key] for key, (ours, _) in RULES.items() if key in values}
    settings: dict[str, Any] = {ours: values[key] for key, (ours, _) in SETTINGS.items() if key in values}
    own = replace(defaults, **settings, rules=replace(defaults.rules, **rules))
    if "conditioning_data_dir" in values:
        own = replace(own, hints=_found(values["conditioning_data_dir"], beside))
    if values.get("is_reg") and "class_tokens" not in settings:
        own = replace(own, class_tokens=defaults.regular_tokens)
    folder = _found(values["image_dir"], beside)
    told = _metadata(_found(values["metadata_file"], beside), folder, own.rules) if "metadata_file" in values else None
    part = read_folder(folder, own, deep=False, told=told, prefix=f"{values['image_dir'].rstrip('/')}/")
    regular = values.get("is_reg", False)
    return replace(part, examples=tuple(replace(example, regular=regular) for example in part.examples))


def _found(name: str, beside: Path) -> Path:
    return beside / name if (beside / name).exists() else Path(name)


def _metadata(path: Path, folder: Path, rules: CaptionRules) -> Told:
    """kohya's own table: {"caption", "tags"} by a picture's path, or by its name with or without ending.

    The path may be one of another machine, for which its last part stands.
    """
    try:
        said = json.loads(FileAt(path).read(MAX_BYTES))
    except (ValueError, RecursionError):
        raise LdmError(f"{printable(str(path))}: is not JSON, expected captions and tags by picture; mend it") from None
    if not isinstance(said, dict):
        raise LdmError(f"{printable(str(path))}: is no JSON object, expected captions and tags by picture")
    last = {PureWindowsPath(key).name: key for key in reversed(said)}  # which divides at either slash
    rows, named = {}, set()
    for picture in list_files(folder, deep=False).files:
        if picture.suffix.lower() not in PICTURES:
            continue
        keys = (str(picture), picture.name, picture.stem, last.get(picture.name), last.get(picture.stem))
        key = next((key for key in keys if isinstance(said.get(key), dict)), None)
        if key is not None:
            tags = said[key].get("tags")
            captions = [*captions_in(said[key]), *([tags] if isinstance(tags, str) and tags.strip() else [])]
            rows[picture] = Row((f"{rules.separator} ".join(captions),) if captions else ())
            named.add(key)
    lost = tuple(
        f"{printable(path.name)}: names {printable(key)}, which is not there" for key in said if key not in named
    )
    return Told(rows, lost)

"""Tensors under their canonical names, wherever they lie: one file, shards, a pickle, a folder.

Canonical are the names of the original single files (see `layout`). Whatever other layout a file has is renamed here,
at the door, so that detecting, comparing and loading know one layout only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import (
    DTYPES,
    MAX_TENSORS,
    TensorInfo,
    is_pickle,
    open_regular,
    printable,
    read_header,
    read_tensors,
)
from ldm.weights.layout import CLIP, FIRST_STAGE, TEXT, UNET
from ldm.weights.pickles import read_pickle

Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]

MAX_JSON = 32 * 1024**2

SCALE_KEY = "ldm.scale_factor"
"""The metadata key of the latents' scale in a file that holds an autoencoder alone, of which no tensor tells it."""


MADE_FOR = "made_for"
"""The key of a fact, see `Source`."""


@dataclass(frozen=True, eq=False)
class Source:
    """Tensors that can be read by name.

    path:     the file or folder, for messages and for files beside it
    tensors:  canonical name -> dtype and shape
    metadata: the file's own words (ModelSpec, `ss_*`, `ldm.config`, `global_step` ...)
    read:     names -> (name, tensor), in the order in which they lie on disk; raises LdmError where that fails
    layout:   what it is on disk, in words: "single file", "shards", "pickle", "diffusers folder" ...
    facts:    what config files beside the tensors say, in our words (all are optional, all values strings):
              `prediction` eps, v or x0; `zero_terminal_snr` true or false; `size` the native side in pixels;
              `scale_factor` of the latents; `made_for`, whose latents a tiny autoencoder is for;
              `heads` or `head_width` of the U-Net (one number);
              `text.N.heads`, `text.N.activation` and `text.N.skip` of text tower N, 0 or 1
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    read: Read
    layout: str = "single file"
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


ALONE: tuple[tuple[str, str], ...] = (
    ("out.2.weight", UNET),
    ("decoder.norm_out.weight", FIRST_STAGE),
    ("ln_final.weight", CLIP),
    ("1.conv.0.weight", f"{FIRST_STAGE}encoder."),
    ("3.conv.0.weight", f"{FIRST_STAGE}decoder."),
    ("decoder.3.conv.0.weight", FIRST_STAGE),
)
"""A tensor that tells which network a file of bare names holds, and the prefix that it has in a whole checkpoint.

The last three are a tiny autoencoder's: the halves in a file each, of which the decoder alone begins with a layer
without tensors, and both in one.
"""

DIFFUSERS = ("conv_out.weight", "decoder.conv_norm_out.weight", "decoder.layers.0.weight",
             "text_model.final_layer_norm.weight", "final_layer_norm.weight")  # fmt: skip
"""A tensor that tells a U-Net, an autoencoder, a tiny one and a text tower (two spellings) of diffusers and
transformers."""


def open_source(path: str | Path, *, allow_pickle: bool = False) -> Source:
    """The tensors of a file or folder, in canonical names where it is a checkpoint or a part of one.

    path: .safetensors, `*.index.json` of shards in the same folder, a folder that diffusers wrote, or, where
    `allow_pickle`, what torch.save wrote (.ckpt, .pt, .pth, .bin). Of adapters, embeddings and whatever else the names
    are left as they are. Headers are read, numbers are not. Raises LdmError that says what is wrong with the file.
    """
    path = Path(path)
    if path.is_dir():
        from ldm.weights.diffusers import read_folder  # which builds on this module

        return read_folder(path, allow_pickle=allow_pickle)
    from ldm.weights.scaled import unscaled  # which builds on this module

    return canonical_source(unscaled(raw_source(path, allow_pickle=allow_pickle)))


def canonical_source(raw: Source) -> Source:
    """One network's tensors under the names that they have in a single file; of anything else the same source."""
    for mark, prefix in ALONE:
        if mark in raw.tensors:
            return renamed_source(raw, {prefix + name: name for name in raw.tensors})
    if any(mark in raw.tensors for mark in DIFFUSERS):
        from ldm.weights.diffusers import read_component

        return read_component(raw)
    return raw


def raw_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """The tensors of a file or of the shards that an index names, with the names that they have on disk."""
    if INDEX.search(path.name):
        return _shards(path, allow_pickle)
    if allow_pickle and is_pickle(path):
        pickled = read_pickle(path)
        infos = {name: TensorInfo(DTYPES[t.dtype], tuple(t.shape)) for name, t in pickled.tensors.items()}
        return Source(path, infos, pickled.metadata, partial(_held, pickled.tensors), "pickle")
    header = read_header(path)
    facts = _told_scale(header.metadata)
    return Source(path, header.tensors, header.metadata, partial(read_tensors, header), facts=facts)


def _told_scale(metadata: Mapping[str, str]) -> dict[str, str]:
    """The latents' scale as a fact, where the metadata have one that can be: a finite number above zero."""
    try:
        scale = float(metadata[SCALE_KEY])
    except (KeyError, ValueError):
        return {}
    return {"scale_factor": str(scale)} if 0 < scale < math.inf else {}


def renamed_source(source: Source, names: Mapping[str, str]) -> Source:
    """The same tensors under other names: new name -> the source's. Those that no new name stands for are left out."""
    back = {old: new for new, old in names.items()}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.read(names[new] for new in wanted):
            yield back[name], tensor

    return replace(source, tensors={new: source.tensors[old] for new, old in names.items()}, read=read)


def with_part(source: Source, prefix: str, other: Source) -> Source:
    """`source` with the tensors under a prefix of `layout` (UNET, FIRST_STAGE, TEXT) taken from `other` instead.

    Under TEXT a tower takes the place of the one of its kind, CLIP-L or OpenCLIP, and goes where the system that the
    U-Net is made for keeps it. Raises LdmError where `other` has no such part.
    """
    names = _tower_names(source, other) if prefix == TEXT else {n: n for n in other.tensors if n.startswith(prefix)}
    if not names:
        kind = {UNET: "U-Net", FIRST_STAGE: "autoencoder"}.get(prefix, "text encoder")
        raise LdmError(f"{printable(str(other.path))}: has no {kind}; expected a file with one")
    part = renamed_source(other, names)
    homes = tuple(_homes(part).values()) if prefix == TEXT else (prefix,)
    kept = {name: info for name, info in source.tensors.items() if not name.startswith(homes)}
    towers = {f"text.{_index(home)}" for home in homes if prefix == TEXT}
    facts = {
        key: value
        for key, value in source.facts.items()
        if FACTS.get(key.split(".")[0], UNET) != prefix or (prefix == TEXT and key.rpartition(".")[0] not in towers)
    }
    for key, value in other.facts.items():
        if FACTS.get(key.split(".")[0], UNET) == prefix:
            facts[_moved(key, homes)] = value
    return replace(with_tensors(replace(source, tensors=kept), part), facts=facts)


def with_tensors(source: Source, other: Source) -> Source:
    """All tensors of `other`, and those of `source` that have names of their own."""

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = list(wanted)
        yield from source.read(name for name in wanted if name not in other.tensors)
        yield from other.read(name for name in wanted if name in other.tensors)

    return replace(source, tensors={**source.tensors, **other.tensors}, read=read)


FACTS = {"text": TEXT, "scale_factor": FIRST_STAGE, MADE_FOR: FIRST_STAGE}
"""The part that a fact is about, by its first word; any other is about the U-Net."""


def _moved(key: str, homes: tuple[str, ...]) -> str:
    """A fact about the one text tower of a file, as one about the tower with the index that it has now."""
    if key.startswith("text.") and len(homes) == 1:
        return re.sub(r"\d", _index(homes[0]), key, count=1)
    return key


def _index(home: str) -> str:
    """The index of the text tower that lies under this prefix."""
    return home.split(".")[2] if home.startswith("conditioner.") else "0"


TOWER = re.compile(r"(cond_stage_model|conditioner\.embedders\.\d)\.(model|transformer)\.")
"""Where a text tower lies; `model` holds OpenCLIP's names, `transformer` Hugging Face's."""


def _homes(source: Source) -> dict[str, str]:
    """The prefixes of a source's text towers, by kind: `model` or `transformer`."""
    return {match[2]: match[0] for name in source.tensors if (match := TOWER.match(name))}


def _tower_names(source: Source, other: Source) -> dict[str, str]:
    """The names that the towers of `other` have in a system like `source` -> their names in `other`."""
    homes, names = _homes(source), {}
    for kind, home in _homes(other).items():
        place = homes.get(kind) or _new_home(source, kind, other.shapes.get(f"{home}ln_final.weight"))
        names |= {place + name.removeprefix(home): name for name in other.tensors if name.startswith(home)}
    return names


def _new_home(source: Source, kind: str, width: tuple[int, ...] | None) -> str:
    """Where a system that has no tower of this kind yet keeps it, by what its U-Net is made for."""
    if f"{UNET}label_emb.0.0.weight" not in source.tensors:
        return f"{TEXT}{kind}."
    context = next((s[-1:] for name, s in source.shapes.items() if name.endswith("attn2.to_k.weight")), None)
    alone = kind == "transformer" or context == width  # which is the refiner
    return f"conditioner.embedders.{0 if alone else 1}.{kind}."


INDEX = re.compile(r"\.index(\.\w+)?\.json$")
"""How the name of an index of shards ends; a variant, as fp16, may stand in it."""


def _shards(path: Path, allow_pickle: bool) -> Source:
    """The files that an index names, which must lie beside it and hold what it says."""
    weight_map = _weight_map(path)
    sources = {
        shard: raw_source(path.with_name(shard), allow_pickle=allow_pickle)
        for shard in sorted(set(weight_map.values()))
    }
    for name, shard in weight_map.items():
        if name not in sources[shard].tensors:
            raise LdmError(f"{printable(str(path))}: {shard} lacks {printable(name)}, which the index puts there")

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = list(wanted)
        for shard, source in sources.items():
            yield from source.read(name for name in wanted if weight_map[name] == shard)

    tensors = {name: sources[shard].tensors[name] for name, shard in weight_map.items()}
    return Source(path, tensors, {}, read, f"{len(sources)} shards")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> the name of a file in the same folder."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LdmError(f"{printable(str(path))}: has no weight_map; expected the index of a sharded model")
    if len(weight_map) > MAX_TENSORS:
        raise LdmError(f"{printable(str(path))}: names {len(weight_map)} tensors, at most {MAX_TENSORS} are read")
    for shard in set(map(str, weight_map.values())):
        if not SHARD.fullmatch(shard):
            raise LdmError(
                f"{printable(str(path))}: names the file {printable(shard)[:100]!r}; expected a .safetensors file in "
                "the same folder"
            )
    return weight_map


SHARD = re.compile(r"\w[\w.-]{0,200}\.(safetensors|bin)")
"""The names that a shard may have: no folder, no drive, nothing hidden."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that lies beside tensors. Raises LdmError for anything else."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"is longer than {MAX_JSON} bytes")
        value = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        raise LdmError(f"{printable(str(path))}: is no JSON that can be read: {printable(str(error))}") from None
    if not isinstance(value, dict):
        raise LdmError(f"{printable(str(path))}: is no JSON object")
    return value


def _held(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read from memory."""
    yield from ((name, tensors[name]) for name in names)

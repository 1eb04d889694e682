"""Diffusers' layout, read: a folder with a folder for each network, or one network's file.

Whatever is read comes out as a `Source` with the names of the original single files. Config files are read as plain
data: a few known keys are looked at, none of them names code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.hashes import OWN_HASHES
from ldm.weights.io import TensorInfo, printable
from ldm.weights.layout import CLIP, FIRST_STAGE, TEXT, UNET
from ldm.weights.rename import (
    TINY,
    Names,
    autoencoder_names_of,
    join,
    joined_shape,
    text_config_of,
    text_names,
    unet_names_of,
)
from ldm.weights.source import Source, canonical_source, raw_source, read_json, renamed_source

CLIP_L = f"{TEXT}transformer."
"""Where SD 1.x keeps its text tower."""

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""What the file with a network's tensors is called."""

ENDINGS = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json",
           ".bf16.safetensors", ".non_ema.safetensors")  # fmt: skip
PICKLE_ENDINGS = (".bin", ".bin.index.json", ".fp16.bin")

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""Their words for the prediction types."""


def read_folder(path: Path, *, allow_pickle: bool = False) -> Source:
    """The tensors of a folder that diffusers wrote: a pipeline's, or one network's.

    Networks that are not there are left out of the result. Of several files with the same network's tensors the one in
    full precision is taken. Raises LdmError where the folder is of another kind, or a file in it is broken.
    """
    if (weights := _weights(path, allow_pickle)) is not None:
        return canonical_source(raw_source(weights, allow_pickle=allow_pickle))
    if not (path / "unet").is_dir():
        raise LdmError(
            f"{printable(str(path))}: is a folder without a U-Net of diffusers; expected model_index.json and unet/"
        )
    unet = _part(path, "unet", allow_pickle)
    homes = _text_homes(unet, has_first=(path / "text_encoder").is_dir())
    parts = [renamed_component(unet, UNET), renamed_component(_part(path, "vae", allow_pickle), FIRST_STAGE)]
    for folder, home in homes.items():
        parts.append(renamed_component(_part(path, folder, allow_pickle), home))
    towers = dict(zip(homes, range(len(homes)), strict=True))
    return Source(
        path=path,
        tensors={name: info for part in parts for name, info in part.tensors.items()},
        metadata={key: value for key, value in unet.metadata.items() if key not in DROPPED_METADATA},
        read=partial(_read_parts, parts),
        layout="diffusers folder",
        facts=_facts(path, towers),
    )


DROPPED_METADATA = ("format", *OWN_HASHES)
"""What a network's file says of itself alone, and not of the model."""


def read_component(raw: Source) -> Source:
    """One network's tensors in diffusers' or transformers' names -> in ours, with the prefix of a whole checkpoint.

    A config.json of that network in the same folder is looked at. Raises LdmError where the names are of no network.
    """
    raw, config = _spelled(raw), _config_beside(raw.path)
    match _kind(raw):
        case "unet":
            return replace(renamed_component(raw, UNET), layout="diffusers U-Net", facts=_unet_facts(config))
        case "vae":
            facts = {} if TINY in raw.tensors else _first_stage_facts(config)
            return replace(renamed_component(raw, FIRST_STAGE), layout="diffusers autoencoder", facts=facts)
        case "text_encoder":
            home = CLIP if _is_open_clip(raw, config) else CLIP_L
            facts = _text_facts(config, 0, cut=home == CLIP)
            return replace(renamed_component(raw, home), layout="transformers text encoder", facts=facts)
        case _:
            raise LdmError(f"{printable(str(raw.path))}: holds no U-Net, autoencoder or text encoder of diffusers")


def renamed_component(raw: Source, prefix: str) -> Source:
    """The same tensors in our names under a prefix of `layout`, which tells the network.

    Tensors that the network does not have keep their names, behind the prefix. Raises LdmError where the shapes are of
    no such network.
    """
    try:
        names = _names_of(raw, prefix)
        ours = joined_source(raw, {prefix + name: piece for name, piece in names.items()})
    except LdmError as error:
        raise LdmError(f"{printable(str(raw.path))}: {error}") from None
    used = {theirs for piece in names.values() for theirs in piece.names}
    extra = [name for name in raw.tensors if name not in used and not name.endswith(".position_ids")]
    kept = renamed_source(raw, {prefix + name: name for name in extra})
    return replace(ours, tensors={**ours.tensors, **kept.tensors}, read=partial(_read_parts, [ours, kept]))


def _names_of(raw: Source, prefix: str) -> Names:
    """Our name -> theirs, of all tensors whose pieces are there."""
    if prefix == UNET:
        names = unet_names_of(raw.shapes)
    elif prefix == FIRST_STAGE:
        names = autoencoder_names_of(raw.shapes)
    else:
        kind = "open_clip" if prefix.endswith(".model.") else "hugging_face"
        names = text_names(text_config_of(raw.shapes, kind))
    return {name: piece for name, piece in names.items() if all(theirs in raw.tensors for theirs in piece.names)}


def joined_source(raw: Source, names: Names) -> Source:
    """The tensors that pieces of others are joined to, each as soon as its last piece is read."""
    owner = {theirs: ours for ours, piece in names.items() for theirs in piece.names}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[str, dict[str, Tensor]] = {}
        for theirs, tensor in raw.read(theirs for ours in wanted for theirs in names[ours].names):
            ours = owner[theirs]
            waiting.setdefault(ours, {})[theirs] = tensor
            if len(waiting[ours]) == len(names[ours].names):
                yield ours, join(names[ours], waiting.pop(ours))

    shapes = raw.shapes
    infos = {
        ours: TensorInfo(raw.tensors[piece.names[0]].dtype, joined_shape(piece, shapes))
        for ours, piece in names.items()
    }
    return replace(raw, tensors=infos, read=read)


def _read_parts(parts: Iterable[Source], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor from the source that has it."""
    names = list(names)
    for part in parts:
        yield from part.read(name for name in names if name in part.tensors)


def _part(folder: Path, name: str, allow_pickle: bool) -> Source:
    """One network of a pipeline. One that is not there is an empty source."""
    if not (folder / name).is_dir():
        return Source(folder / name, {}, {}, lambda names: iter(()))
    if (weights := _weights(folder / name, allow_pickle)) is None:
        raise LdmError(
            f"{printable(str(folder / name))}: holds no {STEMS[name.startswith('text')]}.safetensors; download it again"
        )
    return _spelled(raw_source(weights, allow_pickle=allow_pickle))


def _weights(folder: Path, allow_pickle: bool) -> Path | None:
    """The file that holds a network's tensors, or the index of its shards."""
    endings = (*ENDINGS, *PICKLE_ENDINGS) if allow_pickle else ENDINGS
    paths = (folder / (stem + ending) for ending in endings for stem in STEMS)
    return next((path for path in paths if path.is_file()), None)


def _kind(raw: Source) -> str | None:
    """The folder that a network lies in, by its tensors' names."""
    marks = {
        "conv_out.weight": "unet",
        "decoder.conv_norm_out.weight": "vae",
        TINY: "vae",
        "text_model.final_layer_norm.weight": "text_encoder",
        "final_layer_norm.weight": "text_encoder",
    }
    return next((kind for mark, kind in marks.items() if mark in raw.tensors), None)


def _spelled(raw: Source) -> Source:
    """A text tower with `text_model.` before its names, which transformers from 5 on may leave out."""
    if "final_layer_norm.weight" not in raw.tensors:
        return raw
    spelled = {name if name == "text_projection.weight" else f"text_model.{name}": name for name in raw.tensors}
    return renamed_source(raw, spelled)


def _text_homes(unet: Source, has_first: bool) -> dict[str, str]:
    """The folders of a pipeline's text towers -> where the single file of its family keeps them."""
    if "add_embedding.linear_1.weight" in unet.tensors:
        first = {"text_encoder": "conditioner.embedders.0.transformer."} if has_first else {}
        return first | {"text_encoder_2": f"conditioner.embedders.{len(first)}.model."}
    projections = (info for name, info in unet.tensors.items() if name.endswith(".proj_in.weight"))
    linear = any(len(info.shape) == 2 for info in projections)
    return {"text_encoder": CLIP if linear else CLIP_L}


def _is_open_clip(raw: Source, config: Mapping[str, Any]) -> bool:
    """Whether a tower that stands alone is OpenCLIP's: by its config, its projection or its width."""
    if "hidden_act" in config:
        return config["hidden_act"] != "quick_gelu"
    width = raw.tensors["text_model.final_layer_norm.weight"].shape[0]
    return "text_projection.weight" in raw.tensors or width in (1024, 1280)


def _facts(path: Path, towers: Mapping[str, int]) -> dict[str, str]:
    """What a pipeline's config files say, as `Source.facts`."""
    unet, vae = _config(path / "unet"), _config(path / "vae")
    scheduler = _config(path / "scheduler", "scheduler_config.json")
    facts = _unet_facts(unet) | _first_stage_facts(vae)
    for folder, index in towers.items():
        facts |= _text_facts(_config(path / folder), index, cut=len(towers) == 1 and folder == "text_encoder")
    if prediction := PREDICTIONS.get(str(scheduler.get("prediction_type"))):
        facts["prediction"] = prediction
    if scheduler.get("rescale_betas_zero_snr") is True:
        facts["zero_terminal_snr"] = "true"
    side, widths = _whole(unet.get("sample_size")), vae.get("block_out_channels")
    if side and isinstance(widths, list) and 0 < len(widths) <= 8:
        facts["size"] = str(side * 2 ** (len(widths) - 1))
    return facts


def _unet_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """The heads. Their `attention_head_dim` is their number where `num_attention_heads` is not given."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    widths = config.get("block_out_channels")
    if number := _whole(heads):
        return {"heads": str(number)}
    if not isinstance(heads, list) or not isinstance(widths, list) or not heads or not all(map(_whole, heads + widths)):
        return {}
    if len(set(heads)) == 1:
        return {"heads": str(heads[0])}
    return {"head_width": str(widths[0] // heads[0])}


def _first_stage_facts(config: Mapping[str, Any]) -> dict[str, str]:
    scale = config.get("scaling_factor")
    known = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf
    return {"scale_factor": str(scale)} if known else {}


def _text_facts(config: Mapping[str, Any], index: int, cut: bool) -> dict[str, str]:
    """cut: the tower is cut behind the layer whose states are used, so its last layer is meant."""
    facts = {f"text.{index}.skip": "0"} if cut else {}
    if heads := _whole(config.get("num_attention_heads")):
        facts[f"text.{index}.heads"] = str(heads)
    if config.get("hidden_act") in ("gelu", "quick_gelu"):
        facts[f"text.{index}.activation"] = config["hidden_act"]
    return facts


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A config file as plain data; nothing where there is none."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _config_beside(path: Path) -> dict[str, Any]:
    """The config of a network whose file keeps the name that diffusers gave it; nothing of any other's."""
    return _config(path.parent) if path.name.partition(".")[0] in STEMS else {}


def _whole(value: Any) -> int | None:
    """The value if it is a whole number above zero."""
    return value if type(value) is int and 0 < value < 2**31 else None

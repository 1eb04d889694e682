"""Files that hold a whole CLIP, both towers, and what each says of how they are built.

| file                    | tensors                                          | how it is built       |
|-------------------------|--------------------------------------------------|-----------------------|
| a checkpoint of ours    | `cond_stage_model.model.*` with `visual.*` in it | its metadata          |
| SD 2.1 unCLIP           | `cond_stage_model.model.*`, `embedder.model.*`   | the tensors           |
| open_clip's             | `visual.*`, and those of a text tower            | open_clip_config.json |
| transformers' CLIPModel | `text_model.*`, `vision_model.*`                 | config.json           |

Both JSON files lie beside the weights. Where there is none, it is read off the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ldm.errors import LdmError
from ldm.models.image_encoder import ImageTower
from ldm.models.presets import SMALL_IMAGE
from ldm.models.text_encoder import OpenCLIPText
from ldm.weights.clip_config import (
    Description,
    Towers,
    check_towers,
    checked,
    hugging_face_towers,
    inferred_towers,
    named_description,
    standard_towers,
)
from ldm.weights.config_json import CONFIG_KEY, config_from_json
from ldm.weights.diffusers import joined_source
from ldm.weights.io import printable, some
from ldm.weights.layout import CLIP, IMAGE, compare_networks, unfilled
from ldm.weights.part import REST_KEY, REST_NAME
from ldm.weights.rename import Names, Piece, text_config_of, text_names
from ldm.weights.source import Source, open_source, raw_source, read_json, renamed_source

OPEN_CLIP_CONFIG = "open_clip_config.json"
FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
"""What the file with the weights is called in a folder, the first that is there."""

CODES = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")
"""How names of tensors end that are no weights."""


@dataclass(frozen=True, eq=False)
class ClipFile:
    """A file with a CLIP.

    source:      its tensors in open_clip's names (text tower, `visual.*`, `logit_scale`)
    towers:      how our own two towers are built that hold them; None where only open_clip's model does
    description: what an open_clip config says of it, where there is one
    told:        what besides the weights decides of its vectors, as it was found; "" where that is all in the file
    guessed:     whether the tensors alone say how it is built, which do not tell everything
    """

    source: Source
    towers: Towers | None
    description: Description | None
    told: str = ""
    guessed: bool = False


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's CLIP in open_clip's names (text tower, `visual.*`, `logit_scale`), mapped.

    Raises LdmError where the file has no image tower.
    """
    source = open_source(path)
    names = [name for name in source.tensors if name.startswith(CLIP)]
    if not any(name.startswith(f"{CLIP}visual.") for name in names):
        raise LdmError(f"{printable(str(path))}: has no image tower ({CLIP}visual.*); use a file of this package")
    return {name.removeprefix(CLIP): tensor for name, tensor in source.read(names)}


def open_clip_file(path: str | Path, *, config: str | None = None, allow_pickle: bool = False) -> ClipFile:
    """What CLIP a file or folder holds; see the table above. Its numbers are not read yet.

    config: the name of one of open_clip's configs, or a JSON file like them, instead of what lies beside the weights.
    Raises LdmError where there is no CLIP, or nothing tells how it is built, or its tensors are other ones.
    """
    path = Path(path)
    raw = raw_source(_weights_in(path, allow_pickle) if path.is_dir() else path, allow_pickle=allow_pickle)
    if raw.layout.endswith("shards"):
        raise _error(raw, "is the index of several files; expected a CLIP in one")
    found = _found(raw, config)
    if found.towers is not None:
        check_towers(found.towers, str(raw.path))
        _check_tensors(found.source, found.towers)
    return found


def _weights_in(folder: Path, allow_pickle: bool) -> Path:
    """The file with the weights in a folder of open_clip's or of transformers'."""
    present = [folder / name for name in FILES if (folder / name).is_file()]
    files = [file for file in present if allow_pickle or file.suffix == ".safetensors"]
    if files:
        return files[0]
    if present:
        return present[0]  # whose reading says why it is refused
    raise LdmError(
        f"{printable(str(folder))}: is a folder without a CLIP; expected {FILES[0]} and {OPEN_CLIP_CONFIG} in it"
    )


def _found(raw: Source, config: str | None) -> ClipFile:
    """Which of the four kinds a file is, by its tensors."""
    raw = _bare(raw)
    names = raw.tensors
    if f"{CLIP}visual.conv1.weight" in names:
        return _ours(_within(raw, {CLIP: ""}))
    if f"{IMAGE}conv1.weight" in names and f"{CLIP}ln_final.weight" in names:
        return _open_clips(_within(raw, {CLIP: "", IMAGE: "visual."}), config)
    if any(name.startswith("visual.") for name in names):
        return _open_clips(raw, config)
    if "vision_model.pre_layrnorm.weight" in names and "text_projection.weight" in names:
        return _hugging_faces(raw)
    if REST_KEY in raw.metadata:
        raise _error(raw, f"is a decoder without its CLIP, which lies in the {REST_NAME} beside it; use that file")
    texts = ("cond_stage_model.", "conditioner.", "text_model.", "token_embedding.", "transformer.resblocks.")
    if any(name.startswith(texts) for name in names):
        raise _error(raw, "has a text tower but no image tower; expected a whole CLIP, as ours or an open_clip file")
    raise _error(raw, "holds no CLIP; expected a file of this package or of open_clip")


def _bare(raw: Source) -> Source:
    """Without what a training run with several processes puts before every name, and what is no weight."""
    names = {name.removeprefix("module."): name for name in raw.tensors if not name.endswith(CODES)}
    return renamed_source(raw, names)


def _within(raw: Source, homes: Mapping[str, str]) -> Source:
    """The tensors under some prefixes, each exchanged for another."""
    names = {
        ours + name.removeprefix(home): name
        for home, ours in homes.items()
        for name in raw.tensors
        if name.startswith(home)
    }
    return renamed_source(raw, names)


def _ours(source: Source) -> ClipFile:
    described = source.metadata.get(CONFIG_KEY)
    if described is None:
        raise _error(source, f"does not say how its towers are built ({CONFIG_KEY}); expected a file of this package")
    config = config_from_json(described)
    image = config.clip_image or (config.image and config.image.tower)
    if image is None:  # in the first file of ours, whose image tower has been the preset's from the start
        image = SMALL_IMAGE
    return ClipFile(source, Towers(config.text[0].tower, image), None)


def _open_clips(source: Source, config: str | None) -> ClipFile:
    """By the config that is named, else by the one beside the file, else by the tensors."""
    beside = source.path.with_name(OPEN_CLIP_CONFIG)
    if config is not None:
        return _described(source, named_description(config))
    if beside.is_file():
        return _described(source, checked(read_json(beside), str(beside)))
    towers = inferred_towers(source.shapes)
    if towers is None:
        raise _error(
            source,
            f"its tensors do not tell how it is built; put its {OPEN_CLIP_CONFIG} beside it, or name one of "
            "open_clip's models by --config",
        )
    return ClipFile(source, towers, None, guessed=True)


def _described(source: Source, description: Description) -> ClipFile:
    return ClipFile(source, standard_towers(description), description, json.dumps(description, sort_keys=True))


def _hugging_faces(raw: Source) -> ClipFile:
    """transformers' CLIPModel, in our names."""
    try:
        names = hugging_face_names(raw)
        source = joined_source(raw, {n: p for n, p in names.items() if all(t in raw.tensors for t in p.names)})
    except LdmError as error:
        raise _error(raw, str(error)) from None
    config, preprocess = (_beside(raw.path, name) for name in ("config.json", "preprocessor_config.json"))
    towers = hugging_face_towers(source.shapes, config, preprocess)
    if towers is None:
        raise _error(raw, "is a model of transformers with other towers than CLIP's; expected open_clip's file of it")
    return ClipFile(source, towers, None, json.dumps([config, preprocess], sort_keys=True), guessed=not config)


def hugging_face_names(raw: Source) -> Names:
    """Our name -> where that tensor is in transformers' CLIPModel, whose towers have blocks of one kind.

    Raises LdmError where the text tower has no shape of CLIP's.
    """
    seen = [
        n for n in raw.tensors if n.startswith("vision_model.encoder.layers.") and n.endswith(".layer_norm1.weight")
    ]
    text = text_config_of(raw.shapes, "open_clip")
    names = text_names(text) | {ours: Piece(theirs, form) for ours, (theirs, form) in AROUND.items()}
    for ours, piece in text_names(replace(text, layers=len(seen))).items():
        if ours.startswith("transformer."):
            theirs = tuple(name.replace("text_model.", "vision_model.", 1) for name in piece.names)
            names[f"visual.{ours}"] = replace(piece, names=theirs)
    return names


AROUND: Mapping[str, tuple[tuple[str], Literal["same", "transposed"]]] = {
    "logit_scale": (("logit_scale",), "same"),
    "visual.proj": (("visual_projection.weight",), "transposed"),
    "visual.class_embedding": (("vision_model.embeddings.class_embedding",), "same"),
    "visual.conv1.weight": (("vision_model.embeddings.patch_embedding.weight",), "same"),
    "visual.positional_embedding": (("vision_model.embeddings.position_embedding.weight",), "same"),
    **{f"visual.ln_pre.{part}": ((f"vision_model.pre_layrnorm.{part}",), "same") for part in ("weight", "bias")},
    **{f"visual.ln_post.{part}": ((f"vision_model.post_layernorm.{part}",), "same") for part in ("weight", "bias")},
}
"""What is around the blocks of an image tower."""


def _beside(path: Path, name: str) -> Mapping[str, Any]:
    """A JSON object in the same folder; an empty one where there is no such file."""
    beside = path.with_name(name)
    return read_json(beside) if beside.is_file() else {}


def _check_tensors(source: Source, towers: Towers) -> None:
    """Raise LdmError where the towers and the temperature are not all that the file holds, in the right shapes."""
    text, image = unfilled(lambda: OpenCLIPText(towers.text)), unfilled(lambda: ImageTower(towers.image))
    compared = compare_networks(source.tensors, {"visual.": image, "": text})
    unexpected = [name for name in compared.unexpected if name not in ("logit_scale", "logit_bias")]
    wrong = (("missing", compared.missing), ("unexpected", unexpected), ("of another shape", compared.misshapen))
    if lists := [f"{len(names)} {kind}: {some(names, 4)}" for kind, names in wrong if names]:
        raise _error(source, f"its tensors are not those of the CLIP that it is told to be; {'; '.join(lists)}")
    if "logit_scale" not in source.tensors:
        raise _error(source, "has no logit_scale, which tells how sure it is; expected a whole CLIP")


def _error(source: Source, message: str) -> LdmError:
    return LdmError(f"{printable(str(source.path))}: {message}")

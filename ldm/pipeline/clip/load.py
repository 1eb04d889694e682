"""From a file to a ready CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ldm.models.image_encoder import ImageTower
from ldm.models.text_encoder import OpenCLIPText
from ldm.pipeline.clip.model import CLIP, clip_of
from ldm.pipeline.device import choose_device
from ldm.pipeline.files import sha256_of
from ldm.pipeline.load import shipped_model
from ldm.weights.clip import ClipFile, open_clip_file
from ldm.weights.clip_config import Towers
from ldm.weights.layout import unfilled

Tower = TypeVar("Tower", OpenCLIPText, ImageTower)


def load_clip(
    path: str | Path | None = None,
    *,
    config: str | None = None,
    device: str | torch.device = "auto",
    allow_pickle: bool = False,
) -> CLIP:
    """The CLIP of a checkpoint of ours, of SD 2.1 unCLIP, of open_clip or of transformers.

    path:         a file, or a folder with one and its config; None: the model that ships with this package
    config:       the name of one of open_clip's configs (ViT-B-32 ...), or a JSON file like them, for weights that have
                  none beside them
    allow_pickle: whether .bin and .pt are read, by a reader that runs nothing that is in them

    Vision transformers with CLIP's own text tower run on our two towers. Every other model is built by open_clip, and
    its pictures are brought to it as open_clip does. Everything runs in float32, whatever the file holds. Nothing is
    ever downloaded. Raises `LdmError` where the file has no CLIP, or not all of it.
    """
    place = choose_device(device)
    path = Path(path) if path is not None else shipped_model()
    file = open_clip_file(path, config=config, allow_pickle=allow_pickle)
    identity = _identity(file)
    name = path.name if path.is_dir() else path.stem
    if file.towers is None:
        from ldm.pipeline.clip.open_clip_model import open_clip_model  # which imports open_clip: seconds

        return open_clip_model(file, name=name, identity=identity, device=place)
    return _of_towers(file, file.towers, name, identity, place)


def _of_towers(file: ClipFile, towers: Towers, name: str, identity: str, place: torch.device) -> CLIP:
    """A CLIP of our two towers, which are known to fit."""
    tensors = dict(file.source.read(file.source.tensors))
    visual = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    text, image = unfilled(lambda: OpenCLIPText(towers.text)), unfilled(lambda: ImageTower(towers.image))
    return clip_of(
        _filled(text, {name: tensors[name] for name in text.state_dict()}, place),
        _filled(image, visual, place),
        name=name,
        identity=identity,
        scale=float(tensors["logit_scale"].float().exp()),
        bias=float(tensors["logit_bias"].float()) if "logit_bias" in tensors else 0.0,
        notes=(GUESSED.format(path=file.source.path),) if file.guessed else (),
    )


GUESSED = "{path}: nothing says how it is built: read off its tensors, with GELU; --config NAME says otherwise"


def _identity(file: ClipFile) -> str:
    """The file's SHA-256; where a config decides what the same weights mean, of both."""
    digest = sha256_of(file.source.path) or ""
    return hashlib.sha256(f"{digest} {file.told}".encode()).hexdigest() if file.told else digest


def _filled(tower: Tower, tensors: Mapping[str, Tensor], place: torch.device) -> Tower:
    """A tower that was built on `meta`, with its weights in float32."""
    state = {name: tensor.to(device=place, dtype=torch.float32) for name, tensor in tensors.items()}
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval().requires_grad_(False)

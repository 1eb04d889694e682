"""From a file to a ready CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.image_encoder import ImageTower
from ldm.models.text_encoder import OpenCLIPText
from ldm.pipeline.clip import CLIP, clip_of
from ldm.pipeline.device import choose_device
from ldm.pipeline.files import sha256_of
from ldm.pipeline.load import shipped_model
from ldm.weights.clip import read_clip
from ldm.weights.config_json import CONFIG_KEY, config_from_json
from ldm.weights.io import printable
from ldm.weights.source import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

Tower = TypeVar("Tower", OpenCLIPText, ImageTower)


def load_clip(path: str | Path | None = None, *, device: str | torch.device = "auto") -> CLIP:
    """The CLIP of a checkpoint of ours; None: of the model that ships with this package.

    Raises `LdmError` where the file has none.
    """
    place = choose_device(device)
    path = Path(path) if path is not None else shipped_model()
    tensors = read_clip(path)
    described = open_source(path).metadata.get(CONFIG_KEY)
    config = None if described is None else config_from_json(described)
    if config is None or config.clip_image is None:
        raise LdmError(f"{printable(str(path))}: does not say how its image tower is built; use a file of this package")
    with torch.device("meta"):
        text, image = OpenCLIPText(config.text[0].tower), ImageTower(config.clip_image)
    visual = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    return clip_of(
        _filled(text, {name: tensors[name] for name in text.state_dict()}, place),
        _filled(image, visual, place),
        name=path.stem,
        identity=sha256_of(path) or "",
        scale=float(tensors["logit_scale"].float().exp()),
    )


def _filled(tower: Tower, tensors: Mapping[str, Tensor], place: torch.device) -> Tower:
    """A tower that was built on `meta`, with its weights in float32."""
    state = {name: tensor.to(device=place, dtype=torch.float32) for name, tensor in tensors.items()}
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval().requires_grad_(False)

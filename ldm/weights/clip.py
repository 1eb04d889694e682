"""The whole CLIP model that our own checkpoints carry: its text tower serves pictures, its image tower other tasks."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import printable
from ldm.weights.layout import CLIP
from ldm.weights.source import open_source


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's CLIP in open_clip's names (text tower, `visual.*`, `logit_scale`), mapped.

    Raises LdmError where the file has no image tower.
    """
    source = open_source(path)
    names = [name for name in source.tensors if name.startswith(CLIP)]
    if not any(name.startswith(f"{CLIP}visual.") for name in names):
        raise LdmError(f"{printable(str(path))}: has no image tower ({CLIP}visual.*); use a file of this package")
    return {name.removeprefix(CLIP): tensor for name, tensor in source.read(names)}

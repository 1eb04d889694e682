"""The whole CLIP model that our own checkpoints carry: its text tower serves pictures, its image tower other tasks."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import printable, read_header, read_tensors
from ldm.weights.layout import CLIP


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's CLIP in open_clip's names (text tower, `visual.*`, `logit_scale`), mapped.

    Raises LdmError where the file has no image tower.
    """
    header = read_header(path)
    names = [name for name in header.tensors if name.startswith(CLIP)]
    if not any(name.startswith(f"{CLIP}visual.") for name in names):
        raise LdmError(f"{printable(str(path))}: has no image tower ({CLIP}visual.*); use a file of this package")
    return {name.removeprefix(CLIP): tensor for name, tensor in read_tensors(header, names)}

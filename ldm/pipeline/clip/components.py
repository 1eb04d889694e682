"""The principal components of a set of image embeddings, and the small file that they are kept in.

Shapes: N embeddings, P width of each, K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import printable, read_header, read_tensors
from ldm.weights.save import write_tensors

NAMES = ("mean", "components", "variances")
RANK = 1e-6
"""Components whose deviation is below this share of that of all together are rounding, and no components."""


@dataclass(frozen=True, eq=False)
class Components:
    """mean (P,); components (K, P), orthonormal, of falling variance; variances (K,): all float32 on the CPU."""

    mean: Tensor
    components: Tensor
    variances: Tensor

    def first(self, vectors: Tensor, count: int) -> Tensor:
        """Vectors (N, P) with the first `count` components kept, 0..K, and the mean in place of the others."""
        mean, kept = self.mean.to(vectors), self.components[:count].to(vectors)
        return mean + (vectors - mean) @ kept.T @ kept


def components_of(vectors: Tensor) -> Components:
    """The components of (N, P), N of two or more, that have any variance: at most N - 1 and at most P.

    Raises `LdmError` for fewer vectors, and where they are all the same.
    """
    if len(vectors) < 2:
        raise LdmError(f"components: found {len(vectors)} picture, expected two or more that differ; give more")
    centred = vectors.double().cpu()
    mean = centred.mean(dim=0)
    _, deviations, components = torch.linalg.svd(centred - mean, full_matrices=False)
    count = int((deviations > RANK * float((centred - mean).norm().clamp(min=RANK * mean.norm()))).sum())
    if count == 0:
        raise LdmError("components: found pictures that are all the same to CLIP, expected some that differ")
    variances = deviations[:count] ** 2 / (len(vectors) - 1)
    return Components(mean.float(), components[:count].float(), variances.float())


def save_components(found: Components, path: str | Path) -> None:
    """Write them as a .safetensors file, whole or not at all. Raises `LdmError` where it cannot be written."""
    write_tensors(path, {name: getattr(found, name) for name in NAMES}, {})


def read_components(path: str | Path) -> Components:
    """The components that such a file holds. Raises `LdmError` for a file that is none, or damaged."""
    header = read_header(path)
    shapes = header.shapes
    fits = (
        all(name in shapes for name in NAMES)
        and len(shapes["components"]) == 2
        and shapes["components"][1:] == shapes["mean"]
        and shapes["components"][:1] == shapes["variances"]
        and shapes["components"][0] > 0
    )
    if not fits:
        raise LdmError(f"{printable(str(path))}: holds no principal components, expected a file by `ldm pca --write`")
    tensors = {name: tensor.float().clone() for name, tensor in read_tensors(header, NAMES)}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise LdmError(f"{printable(str(path))}: holds numbers that are not finite; the file is damaged")
    return Components(tensors["mean"], tensors["components"], tensors["variances"])

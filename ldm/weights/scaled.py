"""Weights of eight bits with a scale beside them, as "scaled fp8" files have them, read as the numbers they stand for.

    NAME.weight (float8) and NAME.weight_scale or NAME.scale_weight: weight = stored * scale

The scale is one number for the tensor, as in most published files, or one for each row, as in ours. Published ones have
things beside it that only matter to those who calculate in eight bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.io import TensorInfo, printable
from ldm.weights.source import Source

SCALES = ("weight_scale", "scale_weight")
"""What is put in the place of `weight` in a scale's name: the newer word, which we write, and the older one."""

BESIDE = re.compile(r"(.+\.)?(scale_input|input_scale|scaled_fp8|comfy_quant)")
"""Scales of what a layer is given, and marks that say how a file is scaled."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448, which the largest number of a row becomes."""


def is_scaled(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether some weights have a scale beside them."""
    return bool(_scales(tensors))


def unscaled(source: Source) -> Source:
    """The source with each scaled weight as float32, and without the scales; of any other file the same source.

    Raises LdmError for scales of blocks.
    """
    scales = _scales(source.tensors)
    if not scales:
        return source
    for name, scale in scales.items():
        count, rows = source.tensors[scale].count, source.tensors[name].shape[:1]
        if count != 1 and (count,) != rows:
            raise LdmError(
                f"{printable(str(source.path))}: {printable(scale)} has {count} numbers, expected one, or one for each"
                " row of its weight; use the file in float16 or bfloat16"
            )
    taken = set(scales.values())
    kept = {n: i for n, i in source.tensors.items() if n not in taken and not BESIDE.fullmatch(n)}
    infos = {name: TensorInfo("F32", info.shape) if name in scales else info for name, info in kept.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        factors = {name: factor.float() for name, factor in source.read(scales[n] for n in names if n in scales)}
        for name, tensor in source.read(names):
            factor = factors[scales[name]] if name in scales else None
            yield name, tensor if factor is None else tensor.float() * _over_rows(factor, tensor)

    return replace(source, tensors=infos, read=read)


def scaled_down(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A weight (N, ...) called `....weight` as float8_e4m3fn and the float32 scale (N,) of its rows, by their names.

    It has three bits behind the first one, so that all but the smallest numbers of a row are within 1/16 of the truth.
    """
    rows = weight.detach().float().flatten(1)
    scale = (rows.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    stored = (rows / scale[:, None]).to(torch.float8_e4m3fn).view(weight.shape)
    return {name: stored, name.removesuffix("weight") + SCALES[0]: scale}


def _scales(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Names of weights that have eight bits and a scale -> the scale's name."""
    found = {}
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype in ("F8_E4M3", "F8_E5M2"):
            named = (name.removesuffix("weight") + scale for scale in SCALES)
            if scale := next((scale for scale in named if scale in tensors), None):
                found[name] = scale
    return found


def _over_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale in a shape that goes with the weight's."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1)) if weight.ndim else scale.reshape(())

"""What `ldm convert` does to a checkpoint: each function takes sources and gives one whose tensors are made when read.

So a chain of them costs no memory until it is written, and then a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.adapters.apply import Changes, merged
from ldm.weights.io import TensorInfo, printable
from ldm.weights.layout import FIRST_STAGE, UNET, not_needed_as
from ldm.weights.source import Source, renamed_source

EMA = "model_ema."
NETWORKS = (UNET, FIRST_STAGE, "cond_stage_model.", "conditioner.embedders.")
"""Where tensors of networks lie, and not EMA copies or schedule buffers."""

FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
"""Where an inpainting model has more channels than the model that it was made from."""


def ema_name(name: str) -> str:
    """Where a U-Net tensor's EMA copy lies in a single file: LDM writes the name that its wrapper has, without dots."""
    return EMA + name.removeprefix("model.").replace(".", "")


def without_ema(source: Source) -> Source:
    """The same without EMA copies."""
    return kept(source, lambda name: not name.startswith(EMA))


def with_ema(source: Source) -> Source:
    """The EMA copies in place of the U-Net's tensors. Raises LdmError where there are none, or not all of them."""
    names = [name for name in source.tensors if name.startswith(UNET)]
    absent = [name for name in names if ema_name(name) not in source.tensors]
    if absent or not names:
        has = "no EMA copies" if len(absent) == len(names) else f"no EMA copy of {len(absent)}, the first {absent[0]}"
        raise LdmError(f"{printable(str(source.path))}: has {has}; leave out --ema use")
    for name in names:
        if source.tensors[name].shape != source.tensors[ema_name(name)].shape:
            raise LdmError(
                f"{printable(str(source.path))}: the EMA copy of {name} has another shape; leave out --ema use"
            )
    others = {name: name for name in source.tensors if not name.startswith((UNET, EMA))}
    return renamed_source(source, others | {name: ema_name(name) for name in names})


def kept(source: Source, wanted: Callable[[str], bool]) -> Source:
    """The tensors whose names are wanted."""
    return replace(source, tensors={name: info for name, info in source.tensors.items() if wanted(name)})


def extended(source: Source, extra: Mapping[str, Tensor]) -> Source:
    """With tensors of float32 that are at hand beside those of the source."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        yield from ((name, extra[name]) for name in names if name in extra)
        yield from source.read(name for name in names if name not in extra)

    infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in extra.items()}
    return replace(source, tensors={**source.tensors, **infos}, read=read)


def baked(source: Source, changes: Changes) -> Source:
    """With adapters baked in; changes: see `adapters.apply.plan`. Reading raises LdmError for what is not finite."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in merged(source.read(names), changes):
            if name in changes and not torch.isfinite(tensor).all():
                raise LdmError(f"{name} is not finite with these adapters; choose smaller weights")
            yield name, tensor

    return replace(source, read=read)


def weighted(first: Source, second: Source, weight: float) -> Source:
    """(1 - weight) * first + weight * second, tensor by tensor; see `_blended`."""

    def blend(a: Tensor, b: Tensor) -> None:
        a.mul_(1 - weight).add_(_single(b).mul_(weight))

    return _blended(first, [second], blend)


def add_difference(first: Source, second: Source, minus: Source, weight: float) -> Source:
    """first + weight * (second - minus), tensor by tensor: what `second` has learned since it was `minus`."""

    def blend(a: Tensor, b: Tensor, c: Tensor) -> None:
        a.add_(_single(b).sub_(c.float()).mul_(weight))

    return _blended(first, [second, minus], blend)


def unpaired(source: Source, other: Source) -> list[str]:
    """The networks' tensors, EMA copies aside, that `other` has no tensor of the same name for."""
    names = source.tensors.keys() - other.tensors.keys()
    return sorted(name for name in names if name.startswith(NETWORKS) and not_needed_as(name) is None)


def _single(tensor: Tensor) -> Tensor:
    """A copy in float32, to be computed with in place."""
    return tensor.to(torch.float32, copy=True)


def _blended(first: Source, others: Sequence[Source], blend: Callable[..., None]) -> Source:
    """Networks' tensors that all sources have, blended in float32, in the dtype of `first`; its others as they are.

    blend: changes a copy of the first's tensor, given the others'. Where the first has more input channels, as
    inpainting models have, those that the others lack stay as they are. Raises LdmError where tensors of the same name
    have other shapes, or nothing is shared.
    """
    shared = {
        name
        for name, info in first.tensors.items()
        if name.startswith(NETWORKS) and "F" in info.dtype and all(name in other.tensors for other in others)
    }
    if not shared:
        raise _error(first, others[0], "have no tensor in common; expected two models of one family")
    for other in others:
        for name in sorted(shared):
            ours, shape = first.tensors[name].shape, other.tensors[name].shape
            more = name == FIRST_CONVOLUTION and (ours[0], *ours[2:]) == (shape[0], *shape[2:]) and ours[1] > shape[1]
            if ours != shape and not more:
                raise _error(first, other, f"are of two families: {name} is {ours} in one and {shape} in the other")

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        held = [dict(other.read(name for name in names if name in shared)) for other in others]
        for name, tensor in first.read(names):
            yield name, _blend(name, tensor, [tensors.pop(name) for tensors in held]) if name in shared else tensor

    def _blend(name: str, tensor: Tensor, parts: Sequence[Tensor]) -> Tensor:
        result = _single(tensor)
        if name == FIRST_CONVOLUTION:
            channels = min(part.shape[1] for part in parts)
            place, parts = result[:, :channels], [part[:, :channels] for part in parts]
        else:
            place = result
        blend(place, *parts)
        result = result.to(tensor.dtype)
        if not torch.isfinite(result).all():
            raise _error(first, others[0], f"make a {name} that is not finite; choose a smaller weight")
        return result

    return replace(first, read=read)


def _error(first: Source, other: Source, message: str) -> LdmError:
    return LdmError(f"{printable(str(first.path))} and {printable(str(other.path))}: {message}")

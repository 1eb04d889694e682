"""Putting adapters on a model's tensors: every change is computed in float32 from the original weight, then added up.

So the order of adapters is of no matter, and a stack of them is the sum of their changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig
from ldm.weights.adapters.family import meant_for
from ldm.weights.adapters.kinds import Kind, fits
from ldm.weights.adapters.names import Target, Targets, spelled, targets
from ldm.weights.adapters.read import Adapter
from ldm.weights.architecture import Shapes
from ldm.weights.io import printable, some


@dataclass(frozen=True, eq=False)
class Use:
    """An adapter and how strongly it changes the U-Net and the text towers; 1 is as it was trained."""

    adapter: Adapter
    unet: float = 1.0
    text: float = 1.0


@dataclass(frozen=True, eq=False)
class Change:
    """strength * what a kind does, at one target."""

    target: Target
    kind: Kind
    strength: float


Changes = dict[str, list[Change]]
"""Tensor, by its name in a single file -> all that is done to it."""


def plan(config: SystemConfig, shapes: Shapes, uses: Iterable[Use]) -> Changes:
    """All changes that adapters make to a system. shapes: of its tensors, under their names in a single file.

    Raises LdmError for an adapter that does not suit the system: it lists what matches nothing and says for what kind
    of model the file looks to be. Also for a weight that is no finite number, and for an adapter that is given twice.
    """
    uses = list(uses)
    _check_uses(uses)
    places = targets(config, shapes)
    changes: Changes = {}
    for use in uses:
        for target, kind in _resolved(use.adapter, places, config.family).items():
            strength = use.unet if target.network == "unet" else use.text
            if strength:
                changes.setdefault(target.name, []).append(Change(target, kind, strength))
    return changes


def changed(tensor: Tensor, changes: Sequence[Change]) -> Tensor:
    """A new tensor: the original, which stays as it is, plus all changes, in the original's dtype.

    Raises LdmError where it is not finite.
    """
    original = tensor.float()
    total = original.clone()
    for change in changes:
        change.target.of(total).add_(change.kind.delta(change.target.of(original)), alpha=change.strength)
    total = total.to(tensor.dtype)
    if not torch.isfinite(total).all():
        name = printable(changes[0].target.name)
        raise LdmError(
            f"adapters: with them {name} is not finite in {tensor.dtype}; lower their weights, or try float32"
        )
    return total


def merged(tensors: Iterable[tuple[str, Tensor]], changes: Mapping[str, list[Change]]) -> Iterator[tuple[str, Tensor]]:
    """A file's tensors with adapters baked in, one at a time; those that nothing changes are handed through."""
    for name, tensor in tensors:
        yield name, changed(tensor, changes[name]) if name in changes else tensor


def _check_uses(uses: Iterable[Use]) -> None:
    seen = set()
    for use in uses:
        for weight in (use.unet, use.text):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise _error(use.adapter, f"found a weight of {weight!r}, expected a finite number")
        if (path := use.adapter.path.resolve()) in seen:
            raise _error(use.adapter, "is given twice; give it once, with the sum of its weights")
        seen.add(path)


def _resolved(adapter: Adapter, places: Targets, family: str) -> dict[Target, Kind]:
    """Where each change of an adapter goes. Raises LdmError where any has no place."""
    found: dict[Target, Kind] = {}
    lost, misshapen = [], []
    for module, part in adapter.parts.items():
        place = places.get(spelled(module), {})
        for field, kind in (("weight", part.weight), ("bias", part.bias)):
            if kind is None:
                continue
            if (target := place.get(field)) is None:
                lost.append(module if field == "weight" else f"{module} (its bias)")
            elif not fits(kind, target.shape):
                misshapen.append(f"{module} (this model's has shape {target.shape})")
            elif target in found:
                raise _error(adapter, f"{module} is there under another name too")
            else:
                found[target] = kind
    if lost or misshapen:
        kinds = ((lost, "match nothing in it"), (misshapen, "are of another shape"))
        lists = [
            f"{len(names)} of its {len(adapter.parts)} modules {what}: {some(names)}" for names, what in kinds if names
        ]
        guess = meant_for(adapter)
        looks = f"; it looks made for {guess}" if guess else ""
        raise _error(adapter, f"does not suit this {family} model: {'; '.join(lists)}{looks}")
    return found


def _error(adapter: Adapter, message: str) -> LdmError:
    return LdmError(f"{printable(str(adapter.path))}: {message}")

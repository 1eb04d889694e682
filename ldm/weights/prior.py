"""A prior as one .safetensors file that says how it is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoregressive_prior import AutoregressivePrior
from ldm.models.prior import Prior, PriorConfig
from ldm.weights.config_json import record_from_json
from ldm.weights.io import printable, some
from ldm.weights.layout import compare_networks, unfilled
from ldm.weights.save import write_tensors
from ldm.weights.source import Source, raw_source

PRIOR_KEY = "ldm.prior"
"""The metadata key that holds a `PriorConfig` as JSON."""
KNOWN_BY = 8
"""How many numbers of its text projection a CLIP is known by."""


def save_prior(
    path: str | Path,
    prior: Prior | AutoregressivePrior,
    *,
    title: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a prior; what was at `path` is replaced at the end, or stays. The arguments are those of `save_networks`.

    Raises LdmError where the file cannot be written.
    """
    described = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "clip-prior",
        "modelspec.implementation": "ldm",
        "modelspec.title": title or Path(path).stem,
        PRIOR_KEY: json.dumps(asdict(prior.config)),
    }
    write_tensors(path, prior.state_dict(), {**described, **(metadata or {})}, dtype)


def read_prior(path: str | Path, *, device: torch.device | str = "cpu") -> Prior | AutoregressivePrior:
    """A prior from a file that `save_prior` wrote, in float32.

    Raises LdmError where it is no such file, or lacks a tensor, or has one too many or of another shape.
    """
    source = raw_source(Path(path))
    try:
        prior = _build(source)
    except LdmError as error:
        raise LdmError(f"{printable(str(path))}: {error}") from None
    state = {name: t.to(device=device, dtype=torch.float32) for name, t in source.read(prior.state_dict())}
    prior.load_state_dict(state, strict=True, assign=True)
    return prior.eval().requires_grad_(False)


def clip_mark(text_projection: Tensor) -> tuple[float, ...]:
    """What a CLIP is known by to a prior: the first numbers of its text projection (D, P)."""
    return tuple(text_projection.detach().flatten()[:KNOWN_BY].float().tolist())


def is_marked(text_projection: Tensor, mark: tuple[float, ...]) -> bool:
    """Whether this is the CLIP of that mark, up to the rounding of bfloat16; of an empty mark every one is."""
    if not mark:
        return True
    found, wanted = torch.tensor(clip_mark(text_projection)), torch.tensor(mark)
    return len(found) == len(wanted) and bool(((found - wanted).abs() <= 0.01 * wanted.abs().max()).all())


def _build(source: Source) -> Prior | AutoregressivePrior:
    """The network on `meta`, whose tensors the file has."""
    text = source.metadata.get(PRIOR_KEY)
    if text is None:
        raise LdmError(f"is no prior: its metadata has no {PRIOR_KEY}; give a file that this package wrote")
    config = record_from_json(PriorConfig, text, PRIOR_KEY, _check)
    prior = unfilled(lambda: Prior(config) if config.codes is None else AutoregressivePrior(config))
    found = compare_networks(source.tensors, {"": prior})
    wrong = [
        *(f"{name} is missing" for name in found.missing),
        *(f"{name} is not known" for name in found.unexpected),
        *found.misshapen,
    ]
    if wrong:
        raise LdmError(f"does not hold the prior that its metadata describes: {some(wrong, 3)}; get the file again")
    return prior


def _check(config: PriorConfig) -> None:
    """Nothing may be too large to lay out, and the heads must divide the width. Raises ValueError."""
    codes = config.codes
    sizes = [config.projection, config.text_width, config.tokens, config.width]
    sizes += [] if codes is None else [codes.components, codes.buckets, codes.similarities]
    if min(sizes) < 1 or max(sizes) > 65536 or not 1 <= config.layers <= 256:
        raise ValueError("a size is out of range")
    if config.heads < 1 or config.width % config.heads:
        raise ValueError(f"{config.heads} heads do not divide a width of {config.width}")
    if codes is not None and codes.components > config.projection:
        raise ValueError(f"{codes.components} components of {config.projection} numbers")

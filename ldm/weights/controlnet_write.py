"""Writing a trained ControlNet: a file with the original names, or a folder as diffusers writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.models.controlnet import ControlNet
from ldm.models.presets import SystemConfig
from ldm.weights.controlnet import PREFIX
from ldm.weights.diffusers_write import write_controlnet
from ldm.weights.io import DTYPES, TensorInfo
from ldm.weights.save import modelspec, write_tensors
from ldm.weights.source import Source


def write_control(
    path: str | Path,
    network: ControlNet,
    config: SystemConfig,
    *,
    layout: Literal["original", "diffusers"] = "original",
    title: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a ControlNet of a system.

    layout:   "original": a .safetensors file of `control_model.*` tensors that takes the place of what was at `path`,
              which every program reads; "diffusers": a new folder with `config.json`, for their `from_pretrained`
    title:    ModelSpec's; None: the file's name
    dtype:    of every tensor; None: as each is
    metadata: more entries of a file, which win over ours; a folder has none

    Raises LdmError where it cannot be written, or `dtype` cannot hold a number; then nothing is.
    """
    tensors = network.state_dict()
    if layout == "diffusers":
        write_controlnet(path, _source(Path(path), tensors), network.config, dtype=dtype)
        return
    described = modelspec(config, title or Path(path).stem)
    described["modelspec.architecture"] += "/controlnet"
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    write_tensors(path, named, described | dict(metadata or {}), dtype)


def _source(path: Path, tensors: Mapping[str, Tensor]) -> Source:
    """Tensors in memory as what the other writers read from. path: for messages."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensors[name]) for name in names)

    infos = {name: TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Source(path, infos, {}, read)

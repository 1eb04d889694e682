"""Writing one .safetensors file in the original Stable Diffusion layout, described by ModelSpec and our own config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig
from ldm.weights.atomic import replacing
from ldm.weights.config_json import CONFIG_KEY, config_to_json
from ldm.weights.hashes import MODELSPEC_HASH
from ldm.weights.io import DTYPES, ITEM_BYTES, TORCH_DTYPES, TensorInfo, in_groups, printable
from ldm.weights.layout import Networks


def save_networks(
    path: str | Path,
    networks: Networks,
    *,
    title: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a whole checkpoint; what was at `path` is replaced at the end, or stays.

    title:    ModelSpec's; None: the file's name
    dtype:    of every floating-point tensor; None: as each is
    metadata: more entries (`modelspec.author`, `modelspec.license` ...); they win over ours
    extra:    more tensors under their full names, such as CLIP's image tower under `cond_stage_model.model.visual.`

    Raises LdmError where the file cannot be written.
    """
    parts = networks.by_prefix()
    tensors = {prefix + name: t for prefix, network in parts.items() for name, t in network.state_dict().items()}
    described = modelspec(networks.config, title or Path(path).stem) | {CONFIG_KEY: config_to_json(networks.config)}
    write_tensors(path, {**tensors, **(extra or {})}, {**described, **(metadata or {})}, dtype)


def modelspec(config: SystemConfig, title: str) -> dict[str, str]:
    """The ModelSpec 1.0.1 entries of a checkpoint, less the hash."""
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _architecture(config),
        "modelspec.implementation": "ldm" if config.family == "ldm" else IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.resolution": f"{config.size}x{config.size}",
    }
    if config.prediction != "x0":  # which ModelSpec has no word for
        entries["modelspec.prediction_type"] = {"v": "v", "eps": "epsilon"}[config.prediction]
    return entries


IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""What other programs write for files in this layout."""


def _architecture(config: SystemConfig) -> str:
    """ModelSpec's name of an architecture; of ours and of the upscaler, which it has none for, one of our own."""
    extra = config.unet.in_channels - config.autoencoder.latent_channels
    if config.unet.classes is not None and config.family == "sd2":
        return "stable-diffusion-v2-x4-upscaler"
    if config.image is not None and config.family == "sd2":
        return f"stable-diffusion-v2-unclip-{'l' if config.image.tower.projection == 768 else 'h'}"
    match config.family, extra:
        case "ldm", _:
            return "latent-diffusion"
        case "sdxl", _:
            return "stable-diffusion-xl-v1-base"
        case "sdxl-refiner", _:
            return "stable-diffusion-xl-v1-refiner"
        case "sd1", 5:
            return "stable-diffusion-v1-inpainting"
        case "sd1", _:
            return "stable-diffusion-v1"
        case "sd2", 5:
            return "stable-diffusion-v2-inpainting"
        case "sd2", 1:
            return "stable-diffusion-v2-depth"
        case _:
            return "stable-diffusion-v2-768-v" if config.prediction == "v" else "stable-diffusion-v2-512"


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write tensors and metadata as .safetensors; like `write_stream`, of tensors that are at hand."""

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensors[name]) for name in names)

    infos = {name: TensorInfo(DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_stream(path, infos, read, metadata, dtype)


def write_stream(
    path: str | Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensors and metadata as .safetensors, with the SHA-256 of the numbers as `modelspec.hash_sha256`.

    read: names -> (name, tensor), in any order. It is asked for few at a time, and one tensor at a time is converted
    and written, so no second copy is made in memory (the library would make one, and cannot put the hash of the numbers
    before the numbers). Floating-point tensors become `dtype` where one is given. Raises LdmError where the file cannot
    be written, or `dtype` cannot hold a number; then nothing is.
    """
    target = None if dtype is None else DTYPES[dtype]
    dtypes = {name: target if target and "F" in info.dtype else info.dtype for name, info in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[dtypes[name]], name))  # widest first: all aligned
    entries, position = {}, 0
    for name in order:
        end = position + tensors[name].count * ITEM_BYTES[dtypes[name]]
        entries[name] = {"dtype": dtypes[name], "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    digest = hashlib.sha256()
    with replacing(path) as file:
        file.write(_header(entries, {**metadata, MODELSPEC_HASH: f"0x{digest.hexdigest()}"}))  # as long as the true one
        for names in in_groups(order, tensors, BATCH):
            batch = dict(read(names))
            for name in names:
                numbers = _numbers(_cast(name, batch.pop(name).detach().cpu(), TORCH_DTYPES[dtypes[name]]))
                digest.update(numbers)
                file.write(numbers)
        file.seek(0)
        file.write(_header(entries, {**metadata, MODELSPEC_HASH: f"0x{digest.hexdigest()}"}))


BATCH = 32 * 1024**2
"""Bytes that are asked for together: reading begins anew for each batch, which takes a while."""


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the numbers start at a multiple of 8."""
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. Raises LdmError where it cannot hold a number that was finite."""
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and cast.is_floating_point():
        lost = ~cast.isfinite()
        if lost.any() and (lost := lost & tensor.isfinite()).any():
            largest = tensor[lost].double().abs().max().item()
            remedy = "bf16 or fp32 holds it" if dtype == torch.float16 else "leave its precision as it is"
            raise LdmError(f"{printable(name)}: {largest:g} is too large for {DTYPES[dtype]}; {remedy}")
    return cast


def _numbers(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, row by row; nothing is copied where it lies like that already."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

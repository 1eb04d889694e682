"""Our decoder's file: its U-Net and what that is told of pictures by, without the autoencoder and CLIP it shares.

Those lie in the model that it was trained beside, `ldm-small.safetensors`. The file's config describes the whole
system; one more entry of its metadata says by a hash which autoencoder and CLIP belong to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.weights.config_json import CONFIG_KEY, config_from_json, config_to_json
from ldm.weights.io import printable
from ldm.weights.layout import AUGMENTOR, IMAGE_TOKENS, UNET, Networks, build
from ldm.weights.save import modelspec, write_tensors
from ldm.weights.scaled import scaled_down
from ldm.weights.source import Source, renamed_source, with_tensors

REST_KEY = "ldm.rest"
"""The metadata key of a part file: the SHA-256 of all that it lacks, see `rest_hash`."""

REST_NAME = "ldm-small.safetensors"
"""The file that has the rest."""

OWN = (UNET, AUGMENTOR, IMAGE_TOKENS)
"""What a part file holds, by prefix."""

KEPT = ("input_blocks.0.", "time_embed.", "label_emb.", "out.")
"""The U-Net's ends, small and sensitive: kept as they are, they halve what eight bits elsewhere add to its error."""


def is_part(source: Source) -> bool:
    """Whether the rest of this file's system lies in another one."""
    return REST_KEY in source.metadata


def own_networks(source: Source) -> dict[str, nn.Module]:
    """The networks, on `meta`, that a part file holds, by prefix. Raises LdmError where its config is broken."""
    return {prefix: network for prefix, network in _networks(source).items() if prefix in OWN}


def rest_path(source: Source, shipped: Path) -> Path:
    """The file with the rest: beside the part, else the one that ships."""
    beside = source.path.with_name(REST_NAME)
    return beside if beside.exists() else shipped


def with_rest(source: Source, rest: Source) -> Source:
    """A part file's source, with what it lacks from another one. Raises LdmError where they do not belong together."""
    networks = {prefix: network for prefix, network in _networks(source).items() if prefix not in OWN}
    names = [prefix + name for prefix, network in networks.items() for name in network.state_dict()]
    missing = [name for name in names if name not in rest.tensors]
    if missing or rest_hash(dict(rest.read(names))) != source.metadata[REST_KEY]:
        found = "lacks some of it" if missing else "has another autoencoder or CLIP than it was trained with"
        raise LdmError(
            f"{printable(str(source.path))}: is a decoder that needs the rest of its model, and"
            f" {printable(str(rest.path))} {found}; put the {REST_NAME} that belongs to it beside it"
        )
    return with_tensors(source, renamed_source(rest, {name: name for name in names}))


def rest_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers, these as float16, in which they ship, by the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


def save_part(path: str | Path, networks: Networks, *, title: str | None = None, eight_bits: bool = True) -> None:
    """Write a decoder's own part as .safetensors: float16, its U-Net's matrices as scaled float8 where `eight_bits`.

    What was at `path` is replaced at the end, or stays. Raises LdmError where the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for prefix, network in networks.by_prefix().items():
        for name, tensor in network.state_dict().items():
            if prefix not in OWN:
                rest[prefix + name] = tensor
            elif eight_bits and prefix == UNET and tensor.ndim > 1 and not name.startswith(KEPT):
                tensors |= scaled_down(prefix + name, tensor)
            else:
                tensors[prefix + name] = tensor.half()
    metadata = modelspec(networks.config, title or Path(path).stem)
    metadata |= {CONFIG_KEY: config_to_json(networks.config), REST_KEY: rest_hash(rest)}
    write_tensors(path, tensors, metadata)


def _networks(source: Source) -> dict[str, nn.Module]:
    """All networks of a part file's system, on `meta`, by prefix."""
    try:
        return build(config_from_json(source.metadata.get(CONFIG_KEY, ""))).by_prefix()
    except LdmError as error:
        raise LdmError(f"{printable(str(source.path))}: {error}") from None

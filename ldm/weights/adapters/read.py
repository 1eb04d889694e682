"""Reading adapters: LoRA and LyCORIS files of kohya's scripts, diffusers, peft, ComfyUI and others.

A file names modules (`lora_unet_down_blocks_0_...`) and, at the end of a tensor's name, its role there. Here tensors
are gathered by module into what they do; `names.py` finds the weights that the modules stand for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.weights.adapters.peft import config_of, read_peft_configs
from ldm.weights.adapters.roles import Part, part_of, role_of
from ldm.weights.embeddings import BUNDLE
from ldm.weights.hashes import KOHYA_HASH
from ldm.weights.io import printable, some
from ldm.weights.source import raw_source

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What peft and diffusers call the file in a folder that they write."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA or one of its kin, as it lies in its file.

    name:     the file's, without its ending
    hash:     12 digits, as other programs show it; files that tell a wrong one may share it
    metadata: the file's own words
    parts:    module, as the file names it -> what is done to it
    bundled:  names of the embeddings in the file, which are left to `embeddings.py`
    """

    path: Path
    name: str
    hash: str
    metadata: Mapping[str, str]
    parts: Mapping[str, Part]
    bundled: tuple[str, ...] = ()


def read_adapter(path: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter: a .safetensors file, a folder that peft or diffusers wrote, or, where `allow_pickle`, a pickle.

    All its numbers are read once, for its hash and to see that they are finite; they stay mapped to the file. Whether
    it suits a model is found out when it is put on one. Raises LdmError that names what is wrong.
    """
    path = _file(Path(path))
    source = raw_source(path, allow_pickle=allow_pickle)
    try:
        tensors = dict(source.read(name for name in source.tensors if not name.startswith(BUNDLE)))
        configs = read_peft_configs(source.metadata, path)
        parts = {
            module: part_of(module, roles, config_of(module, configs)) for module, roles in _modules(tensors).items()
        }
    except ValueError as error:
        raise LdmError(f"{printable(str(path))}: {printable(str(error))}") from None
    return Adapter(
        path=path,
        name=path.parent.name if path.name in FILES else path.stem,
        hash=_hash(path, source.metadata, is_pickle=source.layout == "pickle"),
        metadata=source.metadata,
        parts=parts,
        bundled=tuple(sorted({name.split(".")[1] for name in source.tensors if name.startswith(BUNDLE)})),
    )


def _file(path: Path) -> Path:
    """The adapter's file where a folder is given."""
    if not path.is_dir():
        return path
    if found := next((path / name for name in FILES if (path / name).exists()), None):
        return found
    raise LdmError(f"{printable(str(path))}: is a folder without {' or '.join(FILES)}; give the adapter's file")


def _hash(path: Path, metadata: Mapping[str, str], *, is_pickle: bool) -> str:
    """What A1111 shows of a LoRA: of the numbers alone, which kohya's scripts note; of a pickle, of the whole file."""
    said = metadata.get(KOHYA_HASH, "")
    if re.fullmatch(r"[0-9a-f]{64}", said):
        return said[:12]
    with path.open("rb") as file:
        if not is_pickle:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> role -> tensor. Raises ValueError for tensors that no adapter has, or that hold no sane numbers."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, role = role_of(name) or ("", "")
        if not module or (role == "factors" and f"{module}.on_input" not in tensors):
            unknown.append(name)
        elif role in modules.setdefault(module, {}):
            raise ValueError(f"{name} is there under another name too")
        else:
            _check_numbers(name, role, tensor)
            modules[module][role] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} of its {len(tensors)} tensors are of no kind of adapter that is read"
            f" (LoRA, LoCon, LoHa, LoKr, (IA)^3, full, norm; not OFT, BOFT, GLoRA): {some(unknown)}"
        )
    if not modules:
        raise ValueError("holds no tensors of an adapter; expected a LoRA or one of its kin")
    return modules


def _check_numbers(name: str, role: str, tensor: Tensor) -> None:
    shape = tuple(tensor.shape)
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {shape}; expected a rank of 1 at least")
    if role in ("alpha", "on_input"):
        if tensor.numel() != 1:
            raise ValueError(f"{name} has shape {shape}, expected one number")
    elif tensor.ndim == 0 or not tensor.is_floating_point():
        raise ValueError(f"{name} is of {tensor.dtype} and shape {shape}, expected floating-point numbers")
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{name} holds numbers that are not finite; the file is damaged, get it again")

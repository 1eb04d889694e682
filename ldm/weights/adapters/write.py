"""Writing a trained adapter: in kohya's layout, which every program reads, or as diffusers and peft do.

| kind | kohya's, LyCORIS' tensors of a module                           | diffusers', peft's                     |
|------|-----------------------------------------------------------------|----------------------------------------|
| LoRA | lora_down.weight, lora_up.weight, alpha                         | lora_A.weight, lora_B.weight           |
| DoRA | the same, dora_scale (O, 1, ...)                                | the same, lora_magnitude_vector.weight |
| LoHa | hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, alpha               |                                        |
| LoKr | lokr_w1 or lokr_w1_a and _b, lokr_w2 or lokr_w2_a and _b, alpha |                                        |

The strength is a tensor of each module in the first, and in the second JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.presets import SystemConfig
from ldm.weights.adapters.kinds import Dora, Full, Kind, Loha, Lokr, Lora, Product
from ldm.weights.adapters.names import Layout, Target, modules
from ldm.weights.adapters.peft import METADATA_KEY, NETWORKS
from ldm.weights.hashes import KOHYA_HASH, KOHYA_SHORT, WINDOW, WINDOW_START
from ldm.weights.io import printable
from ldm.weights.save import IMPLEMENTATION, modelspec, write_tensors

Parts = Mapping[Target, Kind]
"""Where each change of an adapter goes, and what it is."""


def write_adapter(
    path: str | Path,
    parts: Parts,
    config: SystemConfig,
    *,
    layout: Layout = "kohya",
    title: str | None = None,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter of a system as .safetensors; what was at `path` is replaced at the end, or stays.

    layout:   "diffusers" holds LoRA and DoRA alone
    title:    ModelSpec's; None: the file's name
    metadata: more entries, kohya's `ss_*` above all; they win over ours, which are those of ModelSpec. The hashes
              `sshs_model_hash` and `sshs_legacy_hash` are worked out here, as kohya's scripts do: of a file with the
              `ss_*` entries and nothing else.

    Raises LdmError where the file cannot be written, `dtype` cannot hold a number, one is not finite, or the layout has
    no form for a kind.
    """
    names = modules(config, parts, layout)
    tensors: dict[str, Tensor] = {}
    for target, kind in parts.items():
        form = _kohya(kind, target.shape) if layout == "kohya" else _diffusers(kind, target.shape, names[target])
        tensors |= {f"{names[target]}.{role}": tensor.detach().cpu().contiguous() for role, tensor in form.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LdmError(f"{printable(name)}: holds numbers that are not finite; the training went wrong before this")
    described = _modelspec(config, title or Path(path).stem) | dict(metadata or {})
    if layout == "diffusers":
        described |= {"format": "pt", METADATA_KEY: _peft_config(parts, names)}
    write_tensors(path, tensors, described | _hashes(tensors, described, dtype), dtype)


def _kohya(kind: Kind, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of one module, by how their names end. shape: of the weight."""
    match kind:
        case Lora(product, scale):
            up, down = _factors(product, shape)
            return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(scale * product.rank)}
        case Loha(first, second, scale):
            halves = _half("hada_w1", first) | _half("hada_w2", second)
            return halves | {"alpha": torch.tensor(scale * first.rank)}
        case Lokr(Full(diff), Full() as second, scale):  # whole factors are not scaled by those who read them
            return _half("lokr_w1", Full(diff * scale)) | _half("lokr_w2", second) | {"alpha": torch.tensor(1.0)}
        case Lokr(first, second, scale):
            rank = next(half.rank for half in (first, second) if isinstance(half, Product))
            halves = _half("lokr_w1", first) | _half("lokr_w2", second)
            return halves | {"alpha": torch.tensor(scale * rank)}
        case Dora(inner, magnitude, False):
            ones = [1] * (len(shape) - 1)
            return _kohya(inner, shape) | {"dora_scale": magnitude.reshape(-1, *ones)}
    raise LdmError(f"adapter: {type(kind).__name__} is not written, expected LoRA, LoHa, LoKr or DoRA by outputs")


def _half(name: str, half: Product | Full) -> dict[str, Tensor]:
    if isinstance(half, Full):
        return {name: half.diff}
    up, down = _factors(half, ())
    return {f"{name}_a": up, f"{name}_b": down.flatten(1)}


def _factors(product: Product, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """up and down in the shapes of layers that make the product: (O, R, 1, 1) and (R, I, k, k) for a convolution."""
    if product.core is not None:
        raise LdmError("adapter: factors with a core between them are not written, expected two")
    ones = [1] * (len(shape) - 2)
    return product.up.reshape(*product.up.shape, *ones), product.down


def _diffusers(kind: Kind, shape: tuple[int, ...], module: str) -> dict[str, Tensor]:
    """The same for diffusers. Raises LdmError for a kind that it has no form for."""
    inner = kind.inner if isinstance(kind, Dora) else kind
    if not isinstance(inner, Lora) or (isinstance(kind, Dora) and kind.on_input):
        raise LdmError(
            f"{module}: is of the kind {type(inner).__name__}, expected LoRA or DoRA in diffusers' layout;"
            " write it in kohya's"
        )
    up, down = _factors(inner.product, shape)
    tensors = {"lora_A.weight": down, "lora_B.weight": up}
    if isinstance(kind, Dora):
        ones = [1] * (len(shape) - 2)
        # diffusers writes it without ".weight"; transformers, which reads text towers, finds it only with it
        tensors["lora_magnitude_vector.weight"] = (
            kind.magnitude.reshape(1, -1, *ones) if ones else kind.magnitude.flatten()
        )
    return tensors


def _peft_config(parts: Parts, names: Mapping[Target, str]) -> str:
    """peft's config of each network as JSON: the commonest rank and strength, and what differs from them.

    A path here counts as how modules' names end, so `text_model.` is left away: newer text towers do without it.
    """
    entries: dict[str, Any] = {}
    for network in NETWORKS:
        own = {names[target].removeprefix(f"{network}.").removeprefix("text_model."): kind
               for target, kind in parts.items() if names[target].startswith(f"{network}.")}  # fmt: skip
        if not own:
            continue
        loras = {path: kind.inner if isinstance(kind, Dora) else kind for path, kind in own.items()}
        told = {path: (lora.product.rank, lora.scale * lora.product.rank)
                for path, lora in loras.items() if isinstance(lora, Lora)}  # fmt: skip
        (rank, alpha), _ = Counter(told.values()).most_common(1)[0]
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(own),
            "rank_pattern": {path: one for path, (one, _) in told.items() if one != rank},
            "alpha_pattern": {path: one for path, (_, one) in told.items() if one != alpha},
            "use_dora": any(isinstance(kind, Dora) for kind in own.values()),
        }
        entries |= {f"{network}.{key}": value for key, value in config.items()}
    return json.dumps(entries, indent=2, sort_keys=True)


def _modelspec(config: SystemConfig, title: str) -> dict[str, str]:
    """The ModelSpec entries of an adapter: those of its system, with what differs. It is for no one size."""
    entries = modelspec(config, title)
    del entries["modelspec.resolution"]
    entries["modelspec.architecture"] += "/lora"
    if entries["modelspec.implementation"] == IMPLEMENTATION and config.family != "sdxl":
        entries["modelspec.implementation"] = "diffusers"
    return entries


def _hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype) -> dict[str, str]:
    """What kohya's scripts note, of a file that the safetensors library writes with the `ss_*` entries alone."""
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    bare = save(cast, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    numbers = 8 + int.from_bytes(bare[:8], "little")
    return {
        KOHYA_HASH: hashlib.sha256(memoryview(bare)[numbers:]).hexdigest(),
        KOHYA_SHORT: hashlib.sha256(bare[WINDOW_START : WINDOW_START + WINDOW]).hexdigest()[:8],
    }

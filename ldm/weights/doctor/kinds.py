"""What kind of file it is, by the names of its tensors, and which programs read that kind."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.weights.adapters.roles import role_of
from ldm.weights.detect import CHECKPOINT, kind_of

ADAPTER = "adapter"
CONTROLNET = "ControlNet"
EMBEDDING = "textual-inversion embedding"
UNKNOWN = "unknown"
PART = "decoder of CLIP image embeddings, without its autoencoder and CLIP"
"""What `ldm.weights.part` writes."""

TINY = "tiny autoencoder (TAESD)"
"""How the variant of an autoencoder that is one begins."""

OTHERS: tuple[tuple[str, str], ...] = (
    ("ControlNet-LLLite", r"lllite_.+"),
    ("Control-LoRA", r"lora_controlnet"),
    ("IP-Adapter", r"(ip_adapter|image_proj)\..+"),
    ("T2I-Adapter", r"(adapter\.)?body\.\d+\..+"),
    ("motion module (AnimateDiff)", r".+\.motion_modules\..+"),
    ("hypernetwork", r"\d+\.linear\.\d+\.weight"),
    ("upscaler (ESRGAN)", r"model\.1\.sub\.\d+\..+|(params_ema\.)?body\.0\.rdb1\..+|(RRDB_trunk|rrdb)\..+"),
    ("image encoder (CLIP vision)", r"(vision_model|visual)\..+"),
    ("T5 text encoder (SD 3, Flux)", r"(.+\.)?encoder\.block\.\d+\.layer\..+"),
    (
        "transformer model (SD 3, Flux or later)",
        r"(.+\.)?(joint|double|single)_blocks\..+|(single_)?transformer_blocks\..+",
    ),
    ("optimizer state", r"(state|exp_avg|exp_avg_sq|optimizer)\..+"),
)
"""Kinds that are known but not read, each with a pattern of one of its tensors' whole names."""

ADAPTER_KINDS_NOT_READ = r".+\.(oft_blocks|oft_diag|[ab][12]\.weight|bm\.weight)"
"""OFT, BOFT and GLoRA."""

WEBUI, COMFYUI, DIFFUSERS, KOHYA = "A1111/Forge", "ComfyUI", "diffusers", "kohya"


def kind_of_file(names: Iterable[str]) -> str:
    """A checkpoint, a part of one, an adapter, an embedding, a ControlNet, or what else it looks like."""
    names = list(names)
    kind = kind_of(names)
    if kind == CHECKPOINT:
        return kind
    for other, pattern in OTHERS:
        if any(re.fullmatch(pattern, name) for name in names):
            return other
    roles = [role_of(name) for name in names]
    if any(role and role[0] and role[1] != "factors" for role in roles):
        return ADAPTER
    if any(re.fullmatch(ADAPTER_KINDS_NOT_READ, name) for name in names):
        return ADAPTER
    if kind == UNKNOWN and len(names) == 1 and "." not in names[0]:
        return EMBEDDING  # of diffusers, which calls the one tensor as the word
    return kind


def readers(kind: str, *, layout: str, family: str | None, variant: str = "", adapter: str = "") -> tuple[str, ...]:
    """The programs that load such a file as it is.

    layout: in the words of `Source`; family, variant: as detected; adapter: its kind and the names it uses, as
    "LoRA, kohya". What is not known is left out.
    """
    if family == "ldm":
        return ("ldm",)
    if layout.startswith("diffusers folder"):
        return ("ldm", DIFFUSERS, KOHYA) if family in ("sd1", "sd2", "sdxl") else ("ldm", DIFFUSERS)
    if kind == CHECKPOINT:
        if variant == "text to image":
            return ("ldm", WEBUI, COMFYUI, DIFFUSERS, *((KOHYA,) if family != "sdxl-refiner" else ()))
        return ("ldm", COMFYUI, DIFFUSERS) if variant == "x4 upscaler" else ("ldm", WEBUI, COMFYUI, DIFFUSERS)
    if kind == ADAPTER:
        return _adapter_readers(adapter)
    if kind == EMBEDDING:
        return ("ldm", WEBUI, COMFYUI, DIFFUSERS)
    if kind == CONTROLNET:
        return ("ldm", WEBUI, COMFYUI, DIFFUSERS)
    if variant.startswith(TINY):
        if "diffusers" in layout:
            return "ldm", DIFFUSERS
        return ("ldm", WEBUI, COMFYUI) if "alone" in variant else ("ldm",)
    if kind.startswith("autoencoder"):
        return ("ldm", *(() if "diffusers" in layout else (WEBUI,)), COMFYUI, DIFFUSERS, KOHYA)
    if kind.startswith("U-Net"):
        return ("ldm", COMFYUI, DIFFUSERS)
    return ("ldm", COMFYUI) if kind.startswith("text encoder") else ()


def _adapter_readers(adapter: str) -> tuple[str, ...]:
    kind, _, names = adapter.partition(", ")
    if "not read" in kind:
        return (WEBUI, COMFYUI)
    if not kind.startswith("LoRA"):
        return ("ldm", WEBUI, COMFYUI)
    if names.startswith("kohya"):
        return ("ldm", WEBUI, COMFYUI, DIFFUSERS, KOHYA)
    return ("ldm", COMFYUI, DIFFUSERS)

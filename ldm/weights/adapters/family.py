"""Which family of models an adapter was made for, by what is in it: for messages, never to decide anything."""

from __future__ import annotations

from ldm.models.presets import TEXT_WIDTHS
from ldm.weights.adapters.kinds import size_of
from ldm.weights.adapters.names import spelled
from ldm.weights.adapters.read import Adapter
from ldm.weights.io import printable

ARCHITECTURES = {
    "stable-diffusion-v1": "SD 1.x", "stable-diffusion-v2": "SD 2.x", "stable-diffusion-xl": "SDXL",
    "sd_v1": "SD 1.x", "sd_v2": "SD 2.x", "sd_1": "SD 1.x", "sd_2": "SD 2.x", "sdxl": "SDXL",
}  # fmt: skip
"""What `modelspec.architecture` or `ss_base_model_version` starts with -> the family."""

TRANSFORMERS = ("lora_transformer_", "transformer_", "_single_blocks_", "_double_blocks_", "_joint_blocks_")
"""What stands in the names of modules of models that are no U-Nets: Flux, SD 3 and others."""


def meant_for(adapter: Adapter) -> str | None:
    """The family in words, and what tells it: the width of cross-attention, module names, or the file's metadata."""
    names = {spelled(module): part for module, part in adapter.parts.items()}
    for name, part in names.items():
        if name.endswith(("attn2_to_k", "attn2_to_v")) and part.weight and (size := size_of(part.weight)):
            family = TEXT_WIDTHS.get(size[1], "a model that is not known")
            return f"{family} (its text states are {size[1]} wide)"
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if said := adapter.metadata.get(key):
            family = next((family for start, family in ARCHITECTURES.items() if said.startswith(start)), None)
            return f"{family or 'another kind of model'} ({key} {printable(said[:60])})"
    if adapter.metadata.get("ss_v2") == "True":
        return "SD 2.x (ss_v2)"
    if any(name.startswith(("lora_te2_", "text_encoder_2_")) for name in names):
        return "SDXL (it has a second text encoder)"
    if any(name.startswith(TRANSFORMERS) or any(mark in f"_{name}" for mark in TRANSFORMERS[2:]) for name in names):
        return "a diffusion transformer such as Flux or SD 3, which has no U-Net"
    return None
